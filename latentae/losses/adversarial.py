"""Adversarial losses of autoencoder and discriminator, on logit maps [B, 1, h, w]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from latentae.losses.options import GanLoss
from latentae.losses.reconstruction import wide

__all__ = [
    "LeCam",
    "discriminator_loss",
    "generator_loss",
    "gradient_penalty",
    "mean_logit",
    "twice_differentiable",
]

Maps = Sequence[Tensor]


def mean_logit(maps: Maps) -> Tensor:
    """Mean over each map, then over the maps: maps [B, 1, h, w] -> [B], in at least fp32."""
    return torch.stack([wide(map_).flatten(1).mean(dim=1) for map_ in maps]).mean(dim=0)


def discriminator_loss(loss: GanLoss, real: Maps, fake: Maps) -> Tensor:
    """The discriminator's loss, averaged over each map and then over the maps, [B].

    hinge: 1/2 (relu(1 - D(x)) + relu(1 + D(x'))) (Lim & Ye 2017, "Geometric GAN"; Miyato et al.
    2018, eq. 17; LDM's half). vanilla: 1/2 (softplus(-D(x)) + softplus(D(x'))) (Esser et al. 2021,
    the VQGAN code that LDM uses). non-saturating: softplus(-D(x)) + softplus(D(x')), the cross
    entropy -log s(D(x)) - log(1 - s(D(x'))) of
        Goodfellow et al. 2014, eq. 1, for logits.
    """
    if loss == "hinge":
        return 0.5 * (_mean(lambda d: F.relu(1.0 - d), real) + _mean(lambda d: F.relu(1.0 + d), fake))
    cross_entropy = _mean(lambda d: F.softplus(-d), real) + _mean(F.softplus, fake)
    return 0.5 * cross_entropy if loss == "vanilla" else cross_entropy


def generator_loss(loss: GanLoss, fake: Maps) -> Tensor:
    """The autoencoder's adversarial loss, averaged over each map and then over the maps, [B].

    hinge, vanilla: -D(x') (Miyato et al. 2018, eq. 18; the VQGAN code uses it for both).
    non-saturating: softplus(-D(x')) = -log s(D(x')) (Goodfellow et al. 2014, section 3).
    """
    return _mean(lambda d: F.softplus(-d), fake) if loss == "non-saturating" else -mean_logit(fake)


def gradient_penalty(maps: Maps, images: Tensor) -> Tensor:
    """Squared norm of the gradient of the summed logits at each image, [B], with a graph.

    R1 and R2 are gamma / 2 times it.

    Source: Mescheder et al. 2018, eq. 9 (R1, on real images) and eq. 10 (R2, on reconstructions).
    They have one logit per image. Here all logits of an image are summed, so the effect of gamma
    grows with the number of patches.

    Args:
        maps: logits [B, 1, h, w] of `images`, computed inside `twice_differentiable()`.
        images: [B, C, H, W], requiring a gradient.
    """
    total = torch.stack([wide(map_).sum() for map_ in maps]).sum()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)
    return wide(gradient).square().flatten(1).sum(dim=1)


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Compute attention with plain operators, because fused attention has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


class LeCam(nn.Module):
    """LeCAM regularization of the discriminator (Tseng et al. 2021, arXiv 2104.03310).

    As in the authors' code, relu(D(x) - ema_fake)^2 + relu(ema_real - D(x'))^2, averaged over each
    map and then over the maps. The averages are buffers, which checkpoints save.

    Args:
        decay: share of the averages that an update keeps; the first update sets them.
    """

    real: Tensor
    fake: Tensor
    count: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        for name in ("real", "fake"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, real: Maps, fake: Maps) -> Tensor:
        """Logit maps of images and of reconstructions -> [B]; zero before the first update."""
        on_real = _mean(lambda d: F.relu(d - self.fake).square(), real)
        penalty = on_real + _mean(lambda d: F.relu(self.real - d).square(), fake)
        return torch.where(self.count > 0, penalty, torch.zeros_like(penalty))

    @torch.no_grad()
    def update(self, real_mean: Tensor, fake_mean: Tensor) -> None:
        """Update the averages by mean logits, scalars that are already averaged over processes."""
        kept = self.decay * (self.count > 0).to(self.real.dtype)  # without a device synchronization
        for average, value in ((self.real, real_mean), (self.fake, fake_mean)):
            average.copy_(kept * average + (1.0 - kept) * value.detach())
        self.count += 1


def _mean(function: Callable[[Tensor], Tensor], maps: Maps) -> Tensor:
    return mean_logit([function(wide(map_)) for map_ in maps])
