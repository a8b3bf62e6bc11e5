"""Contraction: how much a code moves when its image does."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from latentae.losses.adversarial import twice_differentiable

__all__ = ["frobenius", "frobenius_exact", "jacobian_energy"]

Encode = Callable[[Tensor], Tensor]


def frobenius(encode: Encode, x: Tensor, probes: Tensor) -> Tensor:
    """Estimate of ||df/dx||_F^2 for each image, [B], with a graph to the encoder's weights where gradients are enabled.

    Source: the contractive penalty of Rifai et al. 2011, eq. 1, by Hutchinson's estimator (1990): E ||J^T v||^2 = ||J||_F^2 for
    probes v with E[v v^T] = I, averaged over k of them. Each costs one backward pass through the encoder, and one more through that
    when the result is differentiated. Where blocks are recomputed (gradient checkpointing), that pass must be inside
    `latentae.losses.adversarial.twice_differentiable()` too, for it runs attention once more.

    Args:
        encode: images -> code, [B, C, H, W] -> [B, z, h, w], each image for itself (`lambda x: model.encode(x).mean`). Not compiled
            by `torch.compile`, which has no second derivatives.
        x: images, [B, C, H, W].
        probes: standard normal or +-1 at random, [k, B, z, h, w].
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), twice_differentiable():
        inputs = x.detach().requires_grad_()
        return jacobian_energy(encode(inputs), inputs, probes, graph=graph)


def frobenius_exact(encode: Encode, x: Tensor) -> Tensor:
    """||df/dx||_F^2 for each image, [B], row by row of the Jacobian: a backward pass for every element of a code, for small models.

    Arguments as for `frobenius`, whose estimate it is the expectation of.
    """
    graph = torch.is_grad_enabled()
    with torch.enable_grad(), twice_differentiable():
        inputs = x.detach().requires_grad_()
        code = encode(inputs)
        rows = torch.eye(code[0].numel(), dtype=code.dtype, device=code.device).view(-1, 1, *code.shape[1:])
        return jacobian_energy(code, inputs, rows, graph=graph) * len(rows)


def jacobian_energy(code: Tensor, x: Tensor, probes: Iterable[Tensor], *, graph: bool = True) -> Tensor:
    """||J^T v||^2 averaged over probes v, for a code that was computed from x already, [B].

    For a training step whose forward pass made the code: x must have required a gradient there, and attention must have run inside
    `latentae.losses.adversarial.twice_differentiable()`, as must the backward pass that recomputes blocks (gradient checkpointing).
    The graph of the code is kept.

    Args:
        code: [B, z, h, w], with a graph that leads to x.
        x: images, [B, C, H, W].
        probes: each [B, z, h, w] or [1, z, h, w].
        graph: whether the result can be differentiated.
    """
    energies = []
    for probe in probes:
        (pulled,) = torch.autograd.grad(
            code, x, probe.to(code.dtype).expand_as(code), create_graph=graph, retain_graph=True
        )  # J^T v: images do not mix, so one pass serves the whole batch
        wide = pulled.to(torch.promote_types(pulled.dtype, torch.float32))
        energies.append(wide.square().flatten(1).sum(dim=1))
    return torch.stack(energies).mean(dim=0)
