"""Second derivatives of ops: their backward pass in differentiable operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["differentiate_backward"]


def differentiate_backward(
    operator: Any, closed_form: Callable[..., Sequence[Tensor | None]], tensors: int
) -> None:
    """Register the gradient of a backward operator.

    Args:
        operator: the backward pass, a `torch.library.custom_op`.
        closed_form: the same pass in differentiable operators. It takes the operator's first
            `tensors` inputs, then the inputs that are not tensors.
        tensors: number of inputs to differentiate. Later tensors are results that `closed_form`
            recomputes.
    """

    def remember(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:tensors])
        ctx.options = [value for value in inputs[tensors:] if not isinstance(value, Tensor)]
        ctx.without_gradient = len(inputs) - tensors

    def gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found = _replay(
            lambda *inputs: closed_form(*inputs, *ctx.options),
            ctx.saved_tensors,
            ctx.needs_input_grad,
            gradients,
        )
        return *found, *(None,) * ctx.without_gradient

    operator.register_autograd(gradient, setup_context=remember)


def _replay(
    closed_form: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Vector-Jacobian product of `closed_form` at `inputs`, differentiable again if grad mode is
    on.

    Unused outputs have gradient None. An input that needs no gradient gets None.
    """
    # aliases: an input may have been computed from another one, along a path that is not part of
    # this function
    with torch.enable_grad():
        aliases = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
        outputs = closed_form(*aliases)
    wanted = {i: alias for i, alias in enumerate(aliases) if alias is not None and needed[i]}
    used = [(out, g) for out, g in zip(outputs, gradients, strict=True) if out is not None and g is not None]
    used = [(out, g) for out, g in used if out.requires_grad]
    if not wanted or not used:
        return [None] * len(inputs)
    outs, tangents = zip(*used, strict=True)
    found = torch.autograd.grad(
        outs, list(wanted.values()), tangents, allow_unused=True, create_graph=torch.is_grad_enabled()
    )
    by_index = dict(zip(wanted, found, strict=True))
    return [by_index.get(i) for i in range(len(inputs))]
