"""All losses of one recipe, as one thing to minimize.

A new loss is a file beside this one, a test, one line in `image_terms`, `latent_terms` or `alignment_terms`, and one in
`LossOptions.effective_weights`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from latentae.losses import reconstruction
from latentae.losses.alignment import AlignmentLoss
from latentae.losses.classifier import ClassifierDistance
from latentae.losses.gram import gram_distance
from latentae.losses.latent import kl_per_element
from latentae.losses.options import LossOptions
from latentae.losses.perceptual import FrozenDistance, build_perceptual
from latentae.losses.wavelet import wavelet
from latentae.models.backbone import FrozenParts
from latentae.models.posterior import DiagonalGaussian

__all__ = ["LossTerms", "Objective"]

_PIXEL_LOSSES = {
    "l1": reconstruction.l1,
    "l2": reconstruction.l2,
    "charbonnier": reconstruction.charbonnier,
    "wavelet": wavelet,
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

    def image_terms(self, x: Tensor, target: Tensor) -> LossTerms:
        """Losses between reconstruction and target, [B, C, H, W] x 2 in [-1, 1], averaged over the batch.

        With an output log-variance s every weighted term is divided by exp(s), and a learned s is a term itself (LDM's
        `contperceptual` sums L / exp(s) + s over elements; here it is their mean). A constant s would add nothing to learn.
        """
        weights = {name: getattr(self.options, name) for name in _PIXEL_LOSSES}
        values = {name: loss(x, target) for name, loss in _PIXEL_LOSSES.items() if weights[name]}
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

    def latent_terms(self, posterior: DiagonalGaussian, target: Tensor) -> LossTerms:
        """Losses on the posterior, averaged over the batch."""
        kl = kl_per_element(posterior, target).mean()
        return LossTerms({"kl": self.options.kl * kl} if self.options.kl else {}, {"kl": kl.detach()})

    def alignment_terms(self, latent: Tensor, images: Tensor) -> LossTerms | None:
        """Alignment of a latent [B, z, h, w] to the features of its images [B, 3, H, W] in [-1, 1], averaged over the batch.

        Not multiplied by its weight: the training step does so, together with the adaptive ratio. None if not in the recipe.
        """
        if self.alignment is None:
            return None
        value = self.alignment(latent, images).mean()
        return LossTerms({"alignment": value}, {"alignment": value.detach()})
