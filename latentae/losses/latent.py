"""Penalties on the latent: KL, sparsity, and the encoder's Jacobian (contractive)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from latentae.errors import RecipeError
from latentae.losses.adversarial import twice_differentiable
from latentae.losses.reconstruction import wide
from latentae.models.base import DiagonalGaussian

__all__ = [
    "active_fraction",
    "frobenius_exact",
    "jacobian_energy",
    "kl_free_bits",
    "kl_per_element",
    "kl_sparsity",
    "l1_sparsity",
    "mean_activation",
    "shared_value",
]


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


def l1_sparsity(mean: Tensor) -> Tensor:
    """Mean |mu|, [B, z, h, w] -> [B] (Olshausen & Field 1996, with S(x) = |x|)."""
    return mean.abs().flatten(1).mean(dim=1)


def mean_activation(mean: Tensor, reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """rho^_j: sigmoid(mu) averaged over batch and positions, [B, z, h, w] -> [z].

    Source: Ng 2011, "Sparse autoencoder", section 3.

    Args:
        mean: of the posterior.
        reduce: averages a detached tensor over processes with equal batches, as for `shared_value`.
    """
    return shared_value(torch.sigmoid(wide(mean)).mean(dim=(0, 2, 3)), reduce)


def kl_sparsity(mean_activation: Tensor, rho: float) -> Tensor:
    """sum_j rho log(rho / rho^_j) + (1 - rho) log((1 - rho) / (1 - rho^_j)), a scalar.

    Source: Ng 2011, section 3.

    Args:
        mean_activation: rho^ in [0, 1], [z].
        rho: target activation in (0, 1); 0.05 is usual.

    Raises:
        RecipeError: rho is outside (0, 1).
    """
    if not 0.0 < rho < 1.0:
        message = f"the target activation rho is {rho:g}, expected a number between 0 and 1; 0.05 is usual"
        raise RecipeError(message)
    found = mean_activation.clamp(1e-6, 1.0 - 1e-6)  # a saturated sigmoid has no gradient to lose
    return (rho * torch.log(rho / found) + (1.0 - rho) * torch.log((1.0 - rho) / (1.0 - found))).sum()


def active_fraction(activation: Tensor, threshold: float) -> Tensor:
    """Share of the latent's elements with |activation| > threshold, [B, z, h, w] -> [B].

    Without gradient.

    Args:
        activation: the posterior's mean for `l1_sparsity`, its sigmoid for `kl_sparsity`.
        threshold: in the units of the activation.
    """
    return (wide(activation.detach()).abs() > threshold).flatten(1).float().mean(dim=1)


def jacobian_energy(code: Tensor, x: Tensor, probes: Iterable[Tensor], *, graph: bool = True) -> Tensor:
    """||J^T v||^2 for J = d code / d x, averaged over probes v, [B].

    With E[v v^T] = I this estimates ||J||_F^2 (Hutchinson 1990), the penalty of Rifai et al. 2011,
    eq. 1. Each probe costs a backward pass through the encoder, and one more when the result is
    differentiated.

    The forward pass of the code must run inside
    `latentae.losses.adversarial.twice_differentiable()`, and so must a backward pass that
    recomputes blocks (gradient checkpointing). torch.compile has no second derivatives. The code's
    graph is retained.

    Args:
        code: [B, z, h, w], computed from x.
        x: images [B, C, H, W] that require a gradient; images must not mix.
        probes: standard normal or random signs, each [B, z, h, w] or [1, z, h, w].
        graph: whether the result can be differentiated.
    """
    energies = []
    for probe in probes:
        v = probe.to(code.dtype).expand_as(code)
        (pulled,) = torch.autograd.grad(code, x, v, create_graph=graph, retain_graph=True)
        energies.append(wide(pulled).square().flatten(1).sum(dim=1))
    return torch.stack(energies).mean(dim=0)


def frobenius_exact(encode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """||df/dx||_F^2 of each image, [B], by one backward pass per element of a code.

    The result has a graph to the encoder's weights if gradients are enabled.

    Args:
        encode: images [B, C, H, W] -> code [B, z, h, w]; not compiled by torch.compile.
        x: images.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), twice_differentiable():
        inputs = x.detach().requires_grad_()
        code = encode(inputs)
        rows = torch.eye(code[0].numel(), dtype=code.dtype, device=code.device).view(-1, 1, *code.shape[1:])
        return jacobian_energy(code, inputs, rows, graph=graph) * len(rows)
