"""All losses of one recipe, as one thing to minimize.

A new regularizer of the latent is a file beside this one, a test, and a line in `regularizers.py`; a new pixel loss a function, a line of
the test, one in `_PIXEL_LOSSES` and one in `LossOptions`. docs/add_a_loss.md goes through both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from latentae.losses import reconstruction, sparsity
from latentae.losses.alignment import AlignmentLoss
from latentae.losses.classifier import ClassifierDistance
from latentae.losses.contractive import jacobian_energy
from latentae.losses.gram import gram_distance
from latentae.losses.latent import kl_free_bits, kl_per_element
from latentae.losses.options import LossOptions
from latentae.losses.perceptual import FrozenDistance, build_perceptual
from latentae.losses.regularizers import REGULARIZERS, regularizer
from latentae.losses.wavelet import wavelet
from latentae.models.backbone import FrozenParts
from latentae.models.base import AutoencoderOutput

__all__ = ["LossTerms", "Objective"]

_PIXEL_LOSSES = {
    "l1": reconstruction.l1,
    "l2": reconstruction.l2,
    "charbonnier": reconstruction.charbonnier,
    "wavelet": wavelet,
    "bce": reconstruction.bce,
}


@dataclass(frozen=True)
class LossTerms:
    """Terms of a sum to minimize.

    Attributes:
        weighted: what is added up, scalars with a graph.
        scalars: the unweighted means that are worth a log line, detached scalars.
    """

    weighted: dict[str, Tensor]
    scalars: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum, a scalar with a graph; a plain zero where no term is weighted."""
        terms = list(self.weighted.values())
        return reduce(torch.add, terms) if terms else next(iter(self.scalars.values())).new_zeros(())

    def merged(self, other: LossTerms) -> LossTerms:
        """Both together."""
        return LossTerms(self.weighted | other.weighted, self.scalars | other.scalars)


class Objective(FrozenParts):
    """The image and latent losses of a recipe; the adversarial term belongs to the training step, which owns both networks.

    Its parameters are what the losses learn: the output log-variance and the projection of the alignment, if the recipe has them.
    They are also all that state_dict() holds. Processes must reduce their gradients like those of the autoencoder.

    Args:
        options: weights of the terms.
        latent_channels: channels z of the latent, for the alignment.

    Raises:
        ModelError, WeightsError, MissingDependencyError: a frozen network can't be had.
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
        """The distance between deep features, where the recipe has one."""
        distance = self.frozen.get("perceptual")
        return distance if isinstance(distance, FrozenDistance) else None

    @property
    def minimum_size(self) -> int:
        """Shortest side of an image in pixels that every loss takes."""
        parts = (self.perceptual, self.alignment.backbone if self.alignment else None)
        return max((part.minimum_size for part in parts if part is not None), default=1)

    def image_terms(self, x: Tensor, target: Tensor, where: Tensor | None = None) -> LossTerms:
        """Losses between reconstruction and target, [B, C, H, W] x 2 in [-1, 1], averaged over the batch.

        Where `where`, [B, 1, H, W], is 0 the target stands in for the reconstruction, and pixel losses are means over the rest (as far as
        they are sums over pixels: a wavelet's support crosses the border); 0 for an image without a rest.

        With an output log-variance s every weighted term is divided by exp(s), and a learned s is a term itself (LDM's
        `contperceptual` sums L / exp(s) + s over elements; here it is their mean). A constant s would add nothing to learn.
        """
        weights = {name: getattr(self.options, name) for name in _PIXEL_LOSSES}
        share = None if where is None else where.flatten(1).mean(dim=1).clamp_min(1 / where[0].numel())
        x = x if where is None else torch.where(where > 0, x, target)
        values = {name: loss(x, target) for name, loss in _PIXEL_LOSSES.items() if weights[name]}
        if share is not None:
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
            weighted["none"] = x.sum() * 0.0  # a graph, so that a purely adversarial recipe works too
        if self.logvar is not None:
            weighted["logvar"], scalars["logvar"] = self.logvar, self.logvar.detach()
        return LossTerms(weighted, scalars)

    def latent_terms(
        self, output: AutoencoderOutput, images: Tensor, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> LossTerms:
        """Losses on the posterior, averaged over the batch.

        Args:
            output: of the autoencoder.
            images: that it was made of, [B, C, H, W] in [-1, 1].
            reduce: averages a detached tensor over processes; terms that are no means over images need the whole batch.
        """
        o, posterior = self.options, output.posterior
        kl = kl_per_element(posterior, images).mean()
        weighted: dict[str, Tensor] = {}
        scalars = {"kl": kl.detach()}
        if o.kl:
            weighted["kl"] = o.kl * (
                kl_free_bits(posterior, images, o.free_bits, reduce) if o.free_bits else kl
            )
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
            return sparsity.l1(mean).mean(), sparsity.active_fraction(mean, o.threshold).mean()
        value = sparsity.kl_sparsity(sparsity.mean_activation(mean, reduce), o.target) / mean.shape[1]
        return value, sparsity.active_fraction(mean.sigmoid(), 0.5).mean()

    def contractive_terms(self, output: AutoencoderOutput, images: Tensor, probes: Tensor) -> LossTerms:
        """The squared Frobenius norm of the encoder's Jacobian over the number of image elements, averaged over the batch.

        Args:
            output: of the autoencoder, made inside `losses.adversarial.twice_differentiable()`.
            images: that it was made of, [B, C, H, W]; they required a gradient.
            probes: standard normal [k, B, z, h, w].
        """
        value = (jacobian_energy(output.posterior.mean, images, probes) / images[0].numel()).mean()
        return LossTerms(
            {"contractive": self.options.contractive.weight * value}, {"contractive": value.detach()}
        )

    def alignment_terms(self, latent: Tensor, images: Tensor) -> LossTerms | None:
        """Alignment of a latent [B, z, h, w] to the features of its images [B, 3, H, W] in [-1, 1], averaged over the batch.

        Not multiplied by its weight: the training step does so, together with the adaptive ratio. None if not in the recipe.
        """
        if self.alignment is None:
            return None
        value = self.alignment(latent, images).mean()
        return LossTerms({"alignment": value}, {"alignment": value.detach()})
