"""Muon: momentum, orthogonalized, for the weights of hidden layers (Jordan et al. 2024, "Muon: An optimizer for hidden layers").

A convolution's weight [out, in, h, w] is taken as the matrix [out, in * h * w]. torch.optim.Muon takes matrices only, one at a time; here
those of one shape are orthogonalized together, for a small model pays mostly for the number of operations.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Muon", "orthogonalized"]

# Newton-Schulz coefficients of the reference code: chosen for their slope at 0, so singular values end between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


class Muon(torch.optim.Optimizer):
    """m <- lerp(m, g, 1 - momentum); W <- (1 - lr wd) W - 0.2 lr sqrt(max(rows, columns)) NS(lerp(g, m, momentum)).

    The factor gives an update the size that AdamW's has, so learning rates and weight decay mean the same (Liu et al. 2025, "Muon is
    scalable for LLM training", eq. 4).

    Args:
        parameters: of two dimensions or more.
        lr: learning rate.
        momentum: share of the average kept at a step.
        weight_decay: decoupled.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape[0], parameter[0].numel()].append(parameter)
            for shape, parameters in shapes.items():
                self._update(group, shape, parameters)
        return loss

    def _update(self, group: dict[str, Any], shape: tuple[int, int], parameters: list[nn.Parameter]) -> None:
        momentum, lr = group["momentum"], group["lr"]
        updates = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            average = state["momentum"].lerp_(gradient, 1 - momentum)
            updates.append(gradient.lerp(average, momentum).reshape(shape))
        scale = -0.2 * lr * math.sqrt(max(shape))
        for parameter, update in zip(parameters, orthogonalized(torch.stack(updates)), strict=True):
            parameter.mul_(1 - lr * group["weight_decay"]).add_(update.reshape(parameter.shape), alpha=scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, U V' of each U S V', by Newton-Schulz; [n, rows, columns] -> the same.

    Approximately: singular values end between about 0.7 and 1.2. Computed in bf16 on a GPU, which the iteration bears, else as given.
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
