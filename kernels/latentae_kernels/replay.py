"""The gradient of a backward pass: its closed form once more in plain torch, which autograd can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["replay"]


def replay(
    closed_form: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Vector-Jacobian product of `closed_form` at `inputs`.

    Args:
        closed_form: the backward pass as a function of `inputs`, in differentiable operators.
        inputs: as autograd saved them.
        needed: which of them want a gradient; longer than `inputs` where arguments that are no tensors follow.
        gradients: one for each output of `closed_form`, None where the output was not used.

    Returns:
        One gradient for each input, None where none is needed. It can be differentiated again if grad mode is on.
    """
    # aliases: one input may have been computed from another, and that path is not this function's
    with torch.enable_grad():
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = closed_form(*aliases)
    wanted = {i: alias for i, alias in enumerate(aliases) if alias is not None and needed[i]}
    used = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out is not None and g is not None]
    used = [(out, g) for out, g in used if out.requires_grad]
    if not wanted or not used:
        return [None] * len(inputs)
    found = torch.autograd.grad(
        [out for out, _ in used],
        list(wanted.values()),
        [g for _, g in used],
        allow_unused=True,
        create_graph=torch.is_grad_enabled(),
    )
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(i) for i in range(len(inputs))]
