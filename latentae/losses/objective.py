"""All losses of one recipe as one objective.

docs/add_a_loss.md shows how to add a regularizer of the latent (a module and a line in
`options.py`) and a pixel loss (a function and lines in `PIXEL_LOSSES` and `LossOptions`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from importlib import import_module

import torch
from torch import Tensor, nn

from latentae.losses import latent, reconstruction
from latentae.losses.alignment import AlignmentLoss
from latentae.losses.options import PIXEL_LOSSES, REGULARIZERS, LossOptions
from latentae.losses.perceptual import ClassifierDistance, FrozenDistance, build_perceptual, gram_distance
from latentae.models.backbone import FrozenParts
from latentae.models.base import AutoencoderOutput

__all__ = ["LossTerms", "Objective", "regularizer"]


@dataclass(frozen=True)
class LossTerms:
    """Terms of a sum to minimize.

    Attributes:
        weighted: the terms of the sum, scalars with a graph.
        scalars: unweighted means for the log, detached scalars.
    """

    weighted: dict[str, Tensor]
    scalars: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum, a scalar with a graph; zero without terms."""
        terms = list(self.weighted.values())
        return reduce(torch.add, terms) if terms else next(iter(self.scalars.values())).new_zeros(())

    def merged(self, other: LossTerms) -> LossTerms:
        """The terms of both."""
        return LossTerms(self.weighted | other.weighted, self.scalars | other.scalars)


class Objective(FrozenParts):
    """The image and latent losses of a recipe.

    The training step adds the adversarial loss and weights the alignment.

    Its parameters are the learned parts of losses: the output log-variance and the alignment's
    projection, if the recipe has them. `state_dict()` has only these. Processes must average their
    gradients as they do for the autoencoder.

    Args:
        options: weights of the terms.
        latent_channels: channels z of the latent, for the alignment.

    Raises:
        ModelError, WeightsError, MissingDependencyError: a frozen network is missing.
    """

    def __init__(self, options: LossOptions, latent_channels: int) -> None:
        super().__init__()
        self.options = options
        p, c, a = options.perceptual, options.classifier, options.alignment
        if p.net != "none" and (p.weight or p.gram):
            self.frozen["perceptual"] = build_perceptual(p.net, p.weights)
        self.classifier = ClassifierDistance(c) if c.weight else None
        self.alignment = AlignmentLoss(a, latent_channels) if a.weight else None
        self.logvar = nn.Parameter(torch.tensor(options.initial_logvar)) if options.learn_logvar else None

    @property
    def perceptual(self) -> FrozenDistance | None:
        """The distance between deep features, if the recipe has one."""
        distance = self.frozen.get("perceptual")
        return distance if isinstance(distance, FrozenDistance) else None

    @property
    def minimum_size(self) -> int:
        """Shortest image side in pixels that every loss accepts."""
        parts = (self.perceptual, self.alignment.backbone if self.alignment else None)
        return max((part.minimum_size for part in parts if part is not None), default=1)

    def image_terms(self, x: Tensor, target: Tensor, where: Tensor | None = None) -> LossTerms:
        """Mean losses between reconstruction and target, [B, C, H, W] x 2 in [-1, 1].

        Where `where`, [B, 1, H, W], is 0 the target replaces the reconstruction, and pixel losses
        are means over the other pixels (0 without any). Wavelets reach across the boundary.

        With an output log-variance s every weighted term is divided by exp(s), and a learned s is a
        term itself. LDM's `contperceptual` sums L / exp(s) + s over elements; here it is their
        mean.
        """
        weights = {name: getattr(self.options, name) for name in PIXEL_LOSSES}
        if where is not None:
            x = torch.where(where > 0, x, target)
        values = {name: getattr(reconstruction, name)(x, target) for name in PIXEL_LOSSES if weights[name]}
        if where is not None:
            share = where.flatten(1).mean(dim=1).clamp_min(1 / where[0].numel())
            values = {name: value / share for name, value in values.items()}
        if self.perceptual is not None:
            weights |= {"perceptual": self.options.perceptual.weight, "gram": self.options.perceptual.gram}
            a, b = self.perceptual.features(x), self.perceptual.features(target)
            if weights["perceptual"]:
                values["perceptual"] = self.perceptual.distance(a, b)
            if weights["gram"]:
                values["gram"] = gram_distance(a, b)
        if self.classifier is not None:
            weights["classifier"] = self.options.classifier.weight
            values["classifier"] = self.classifier(x, target)
        means = {name: value.mean() for name, value in values.items()}
        scalars = {name: value.detach() for name, value in means.items()}
        precision = math.exp(-self.options.initial_logvar) if self.logvar is None else torch.exp(-self.logvar)
        weighted = {name: weights[name] * value * precision for name, value in means.items()}
        if not weighted:
            weighted["none"] = x.sum() * 0.0  # a graph for purely adversarial recipes
        if self.logvar is not None:
            weighted["logvar"], scalars["logvar"] = self.logvar, self.logvar.detach()
        return LossTerms(weighted, scalars)

    def latent_terms(
        self, output: AutoencoderOutput, images: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> LossTerms:
        """Losses on the posterior, averaged over the batch.

        Args:
            output: of the autoencoder.
            images: clean images [B, C, H, W] in [-1, 1].
            reduce: averages a detached tensor over processes, for terms of batch statistics.
        """
        o, posterior = self.options, output.posterior
        kl = latent.kl_per_element(posterior, images).mean()
        weighted: dict[str, Tensor] = {}
        scalars = {"kl": kl.detach()}
        if o.kl:
            value = latent.kl_free_bits(posterior, images, o.free_bits, reduce) if o.free_bits else kl
            weighted["kl"] = o.kl * value
        if o.sparsity.weight:
            value, active = self._sparsity(posterior.mean, reduce)
            weighted["sparsity"] = o.sparsity.weight * value
            scalars |= {"sparsity": value.detach(), "active": active}
        for name in REGULARIZERS:
            if weight := getattr(o, name):
                value = regularizer(name)(output, images).mean()
                weighted[name], scalars[name] = weight * value, value.detach()
        return LossTerms(weighted, scalars)

    def _sparsity(self, mean: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
        """The penalty and the share of active units."""
        o = self.options.sparsity
        if o.kind == "l1":
            return latent.l1_sparsity(mean).mean(), latent.active_fraction(mean, o.threshold).mean()
        value = latent.kl_sparsity(latent.mean_activation(mean, reduce), o.target) / mean.shape[1]
        return value, latent.active_fraction(mean.sigmoid(), 0.5).mean()

    def contractive_terms(self, output: AutoencoderOutput, images: Tensor, probes: Tensor) -> LossTerms:
        """Squared Frobenius norm of the encoder's Jacobian over the number of image elements.

        Args:
            output: of the autoencoder, computed inside `losses.adversarial.twice_differentiable()`.
            images: the encoder's input [B, C, H, W], which requires a gradient.
            probes: standard normal [k, B, z, h, w].
        """
        value = (latent.jacobian_energy(output.posterior.mean, images, probes) / images[0].numel()).mean()
        weighted = self.options.contractive.weight * value
        return LossTerms({"contractive": weighted}, {"contractive": value.detach()})


def regularizer(name: str) -> Callable[[AutoencoderOutput, Tensor], Tensor]:
    """The function of a line of `REGULARIZERS`."""
    return getattr(import_module(f"latentae.losses.{name}"), name)
