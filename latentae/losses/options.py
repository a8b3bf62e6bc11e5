"""Options of the losses. Every image loss is a mean over elements, the KL a sum over the latent divided by image elements."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["AdversarialOptions", "LossOptions", "PerceptualNet", "PerceptualOptions"]

PerceptualNet = Literal["none", "vgg", "alex", "squeeze", "efficientnet-lite0"]
_STRICT = ConfigDict(extra="forbid", frozen=True)


class PerceptualOptions(BaseModel):
    """A distance between deep features."""

    model_config = _STRICT
    net: PerceptualNet = Field(
        default="vgg", description="Feature network: LPIPS on vgg, alex or squeeze, efficientnet-lite0, or none."
    )
    weight: float = Field(default=1.0, ge=0, description="Weight of the distance against a per-element L1 of weight 1.")
    weights: str | None = Field(
        default=None, description="File with the network's ImageNet weights; its cache is searched when not given."
    )


class AdversarialOptions(BaseModel):
    """A PatchGAN discriminator with hinge loss."""

    model_config = _STRICT
    weight: float = Field(
        default=0.0, ge=0, description="Constant weight of the generator's adversarial term; 0 builds no discriminator."
    )
    start_images: int = Field(default=0, ge=0, description="Images seen before the discriminator and its term begin.")
    channels: int = Field(default=64, ge=4, description="Filters of the discriminator's first layer.")
    layers: int = Field(default=3, ge=1, description="Strided layers of the discriminator; 3 sees 70-pixel patches.")
    norm: Literal["none", "group", "instance"] = Field(default="group", description="Normalization inside the discriminator.")


class LossOptions(BaseModel):
    """Weights of all terms; 0 leaves a term out."""

    model_config = _STRICT
    l1: float = Field(default=1.0, ge=0, description="Weight of the mean absolute error.")
    l2: float = Field(default=0.0, ge=0, description="Weight of the mean squared error.")
    charbonnier: float = Field(default=0.0, ge=0, description="Weight of the Charbonnier loss, sqrt(d^2 + 1e-6).")
    kl: float = Field(
        default=1e-6, ge=0, description="Weight of the KL term (latent sum over image elements: LDM's 1e-6 is 1e-6 here)."
    )
    perceptual: PerceptualOptions = PerceptualOptions()
    adversarial: AdversarialOptions = AdversarialOptions()
