"""The contractive penalty: the squared Frobenius norm of the encoder's Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from latentae.losses.adversarial import twice_differentiable
from latentae.losses.reconstruction import wide

__all__ = ["frobenius_exact", "jacobian_energy"]


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
