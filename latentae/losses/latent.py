"""KL penalties on the posterior."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from latentae.models.posterior import DiagonalGaussian

__all__ = ["kl_free_bits", "kl_per_element", "shared_value"]


def kl_per_element(posterior: DiagonalGaussian, images: Tensor) -> Tensor:
    """KL(q || N(0, I)) summed over each latent and divided by the number of *image* elements, [B].

    LDM adds sum-reduced pixel losses and 1e-6 times the sum-reduced KL. Dividing both by the image
    elements keeps that ratio at any resolution and turns the pixel losses into means.
    """
    return posterior.kl() / images[0].numel()


def kl_free_bits(
    posterior: DiagonalGaussian,
    images: Tensor,
    free_bits: float,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """sum_j max(lambda h w, E[KL_j]) divided by the number of *image* elements, a scalar.

    Source: Kingma et al. 2016, IAF: free bits.

    KL_j is the KL of channel j's map. The paper's floor is written as lambda h w, so that lambda
    means the same at any resolution. The maximum is taken of the batch mean, so there is no value
    per image. A channel below its floor has no gradient.

    Args:
        posterior: of a batch.
        images: [B, C, H, W]; only their size is used.
        free_bits: lambda, nats per channel and latent position that cost nothing.
        reduce: averages a detached tensor over processes, as for `shared_value`.
    """
    mean, logvar = posterior.mean, posterior.logvar
    kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).sum(dim=(2, 3))  # [B, z]
    floor = free_bits * mean[0, 0].numel()
    return shared_value(kl.mean(dim=0), reduce).clamp_min(floor).sum() / images[0].numel()


def shared_value(own: Tensor, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
    """A batch mean over all processes whose gradient is this process's share.

    For a batch mean m = mean_r m_r and any f, the mean over processes of df/dm(m) dm_r/dw is
    df(m)/dw. So averaging gradients over processes, as data parallelism does, gives the gradient of
    the global batch. Without the shared value each process would evaluate f' at its own m_r.

    Args:
        own: this process's mean; all processes average over equally many samples.
        reduce: averages a detached tensor over processes; None with one process.
    """
    return own if reduce is None else reduce(own.detach()) + (own - own.detach())
