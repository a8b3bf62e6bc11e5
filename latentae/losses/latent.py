"""Penalties on the latent, one value an image unless said."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from latentae.models.posterior import DiagonalGaussian

__all__ = ["kl_free_bits", "kl_per_element", "shared_value"]


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL(q || N(0, I)) summed over each latent and divided by the number of *image* elements, [B].

    LDM adds sum-reduced pixel losses and 1e-6 times the sum-reduced KL; dividing both by the image elements keeps that ratio at
    any resolution and makes the pixel losses plain means.
    """
    return posterior.kl() / images[0].numel()


def kl_free_bits(
    posterior: DiagonalGaussian,
    images: Tensor,
    free_bits: float,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """sum_j max(lambda h w, E[KL_j]) divided by the number of *image* elements, a scalar (Kingma et al. 2016, IAF: free bits).

    KL_j is that of channel j's whole map, and the paper's floor for it is written as lambda h w here, so that lambda means the same at
    any resolution. The expectation over the batch stands inside the maximum, so there is no value for one image. A channel below its
    floor has no gradient: it may carry that much for nothing.

    Args:
        posterior: of a batch.
        images: [B, C, H, W], counted only.
        free_bits: lambda, nats that each channel may spend on a place of the latent.
        reduce: averages a detached tensor over processes, as for `shared_value`.
    """
    kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1.0 - posterior.logvar).sum(
        dim=(2, 3)
    )  # [B, z]
    floor = free_bits * posterior.mean[0, 0].numel()
    return shared_value(kl.mean(dim=0), reduce).clamp_min(floor).sum() / images[0].numel()


def shared_value(own: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The average over processes, with the gradient of this process's own share.

    For a batch statistic m = mean_r m_r and any f, the mean over processes of df/dm(m) dm_r/dw is df(m)/dw: averaging gradients, as
    data parallelism does, gives that of the whole batch. Without the reduced value each process would take f' at a point of its own.

    Args:
        own: this process's mean, over as many samples as everyone else's.
        reduce: averages a detached tensor over processes; None where there is one.
    """
    return own if reduce is None else reduce(own.detach()) + (own - own.detach())
