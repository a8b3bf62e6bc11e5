"""AdamW, Muon, the learning rate over images seen, and the moving average of weights (EMA)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from latentae.models.base import Autoencoder
from latentae.training.options import OptimizerOptions

__all__ = [
    "Ema",
    "Muon",
    "adamw",
    "autoencoder_optimizers",
    "learning_rate_scale",
    "orthogonalized",
    "set_learning_rate",
]

# Newton-Schulz coefficients of Muon's reference code: a steep slope at 0, so that singular values
# end between about 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def autoencoder_optimizers(
    model: Autoencoder, owned: Iterable[nn.Parameter], options: OptimizerOptions
) -> dict[str, torch.optim.Optimizer]:
    """Optimizers of the autoencoder and of its losses' parameters, by their checkpoint names."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trunk = model.trunk_names() & named.keys() if options.trunk_lr_ratio < 1 else set[str]()
    hidden = {name for name, p in named.items() if options.name == "muon" and _is_hidden(name, p)} - trunk
    rest, owned = [p for name, p in named.items() if name not in hidden | trunk], list(owned)
    found: dict[str, torch.optim.Optimizer] = {}
    if rest or owned:
        found["autoencoder"] = adamw(rest, options.lr, options.betas, options.weight_decay, undecayed=owned)
    if trunk:
        slow, lr = [p for name, p in named.items() if name in trunk], options.trunk_lr_ratio * options.lr
        found["autoencoder-trunk"] = adamw(slow, lr, options.betas, options.weight_decay)
    if hidden:
        matrices, lr = [p for name, p in named.items() if name in hidden], options.muon_lr or options.lr
        found["autoencoder-muon"] = Muon(matrices, lr, weight_decay=options.weight_decay)
    return found


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Weights between the first and last layers of encoder and decoder.

    Muon's authors advise AdamW for all others.
    """
    return parameter.ndim >= 2 and not any(part in name for part in ("conv_in", "conv_out", "quant_conv"))


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019).

    Args:
        parameters: of the network.
        lr: peak learning rate; the training step scales it.
        betas: decay of the two moments.
        weight_decay: decoupled, of `parameters`.
        undecayed: parameters without weight decay, such as those that belong to a loss.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters), "weight_decay": weight_decay}]
    if rest := list(undecayed):
        groups.append({"params": rest, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate_scale(options: OptimizerOptions, images_seen: int, images: int, start: int = 0) -> float:
    """Learning rate over its peak after `images_seen` of `images`, in [0, 1].

    Linear from 0 over `warmup_images`, then constant, or half a cosine down to `final_lr_ratio`
    (Loshchilov & Hutter 2017, eq. 5). A network that begins at image `start` warms up from there.
    """
    warm = min(1.0, (images_seen - start + 1) / options.warmup_images) if options.warmup_images else 1.0
    if options.schedule == "constant":
        return warm
    span = max(1, images - options.warmup_images)
    progress = min(1.0, max(0, images_seen - options.warmup_images) / span)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return warm * (options.final_lr_ratio + (1 - options.final_lr_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Muon(torch.optim.Optimizer):
    """Orthogonalized momentum for the weights of hidden layers.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers".

    m <- lerp(m, g, 1 - momentum); W <- (1 - lr wd) W - 0.2 lr sqrt(max(rows, columns)) NS(lerp(g,
    m, momentum)).

    The factor gives updates the size of AdamW's, so learning rates and weight decay mean the same
    (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4). A convolution's weight [out, in,
    h, w] is the matrix [out, in * h * w]. torch.optim.Muon takes one matrix at a time; here
    matrices of one shape are orthogonalized together, which is faster for small models.

    Args:
        parameters: of two dimensions or more.
        lr: learning rate.
        momentum: share of the average that a step keeps.
        weight_decay: decoupled.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient."""
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
    """U V' of each matrix U S V' by Newton-Schulz iteration; [n, rows, columns] -> the same.

    Approximate: singular values end between about 0.7 and 1.2. Computed in bf16 on a GPU, elsewhere
    in the given type.
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


class Ema:
    """Exponential moving average of a module's parameters in fp32.

    Its half-life is counted in images.

    The half-life grows with the run until it reaches its final value (Karras et al. 2023, "EDM2",
    ramp-up), so that early averages forget the random start.

    Args:
        module: the module to average.
        half_life_images: images after which a weight's share has halved; 0 keeps the latest
            weights.
    """

    RAMP_UP = 0.05

    def __init__(self, module: nn.Module, half_life_images: int) -> None:
        self.half_life_images = half_life_images
        self.weights = {
            name: p.detach().to(torch.float32, copy=True) for name, p in module.named_parameters()
        }
        # buffers, such as the statistics of frozen normalizations, are not averaged
        rest = module.state_dict().items()
        self.fixed = {name: value.detach() for name, value in rest if name not in self.weights}

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Share of the old average that this step keeps."""
        half_life = min(self.half_life_images, images_seen * self.RAMP_UP)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the average towards the module's weights after an optimizer step."""
        latest = [p.detach().float() for p in module.parameters()]
        share = 1 - self.decay(images_seen, batch_size)
        torch._foreach_lerp_(list(self.weights.values()), latest, share)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, and the module's buffers."""
        return {**self.weights, **self.fixed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy averaged weights in place.

        Raises:
            ValueError: a name or a shape differs.
        """
        own = self.state_dict()
        for name in own.keys() ^ state.keys():
            raise ValueError(f"the average {'has unknown' if name in state else 'lacks'} {name}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                shapes = f"has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
                raise ValueError(f"the average of {name} {shapes}")
            value.copy_(state[name])
