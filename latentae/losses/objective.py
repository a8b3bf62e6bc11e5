"""All losses of one recipe, as one thing to minimize.

A new loss is a file beside this one, a test, and one line in `image_terms` or `total`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentae.losses import reconstruction
from latentae.losses.latent import kl_per_element
from latentae.losses.options import LossOptions
from latentae.losses.perceptual import FrozenDistance, build_perceptual
from latentae.models.posterior import DiagonalGaussian

__all__ = ["LossTerms", "Objective"]


@dataclass(frozen=True)
class LossTerms:
    """A weighted sum to minimize (scalar, with a graph) and the unweighted means it is made of (detached scalars)."""

    total: Tensor
    scalars: dict[str, Tensor]


class Objective(nn.Module):
    """The image and latent losses of a recipe; the adversarial term belongs to the training step, which owns both networks.

    Raises:
        WeightsError, MissingDependencyError: the perceptual network's weights can't be had.
    """

    def __init__(self, options: LossOptions) -> None:
        super().__init__()
        self.options = options
        wanted = options.perceptual.weight > 0 and options.perceptual.net != "none"
        self.perceptual: FrozenDistance | None = (
            build_perceptual(options.perceptual.net, options.perceptual.weights) if wanted else None
        )

    def image_terms(self, x: Tensor, target: Tensor) -> LossTerms:
        """Losses between reconstruction and target, [B, C, H, W] x 2 in [-1, 1], averaged over the batch."""
        weights: dict[str, float] = {"l1": self.options.l1, "l2": self.options.l2, "charbonnier": self.options.charbonnier}
        values = {name: getattr(reconstruction, name)(x, target).mean() for name, weight in weights.items() if weight}
        if self.perceptual is not None:
            weights["perceptual"] = self.options.perceptual.weight
            values["perceptual"] = self.perceptual(x, target).mean()
        total = sum((weights[name] * value for name, value in values.items()), start=torch.zeros((), device=x.device))
        if not values:
            total = x.sum() * 0.0  # a graph, so that a purely adversarial recipe works too
        return LossTerms(total, {name: value.detach() for name, value in values.items()})

    def latent_terms(self, posterior: DiagonalGaussian, target: Tensor) -> LossTerms:
        """Losses on the posterior, averaged over the batch."""
        kl = kl_per_element(posterior, target).mean()
        return LossTerms(self.options.kl * kl, {"kl": kl.detach()})

    def effective_weights(self) -> dict[str, float]:
        """Weight of every active term, per image element (the KL: per image element of the latent's sum)."""
        o = self.options
        weights = {"l1": o.l1, "l2": o.l2, "charbonnier": o.charbonnier, "kl": o.kl}
        if self.perceptual is not None:
            weights[self.perceptual.name] = o.perceptual.weight
        if o.adversarial.weight:
            weights["adversarial (hinge)"] = o.adversarial.weight
        return {name: weight for name, weight in weights.items() if weight}
