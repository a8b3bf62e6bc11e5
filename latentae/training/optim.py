"""Optimizers, and the learning rate as a function of images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from latentae.models.base import Autoencoder
from latentae.models.trainable import trunk_names
from latentae.training.muon import Muon
from latentae.training.options import OptimizerOptions

__all__ = ["adamw", "autoencoder_optimizers", "learning_rate_scale", "set_learning_rate"]


def adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float = 0.0,
    undecayed: Iterable[nn.Parameter] = (),
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); its rate is set before every step.

    Args:
        parameters: of the network.
        lr: peak learning rate.
        betas: decay of the two moments.
        weight_decay: decoupled, of `parameters`.
        undecayed: parameters without weight decay, such as those that belong to a loss.
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters), "weight_decay": weight_decay}]
    rest = list(undecayed)
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def autoencoder_optimizers(
    model: Autoencoder, owned: Iterable[nn.Parameter], options: OptimizerOptions
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of an autoencoder's trainable parameters and of those that its losses own, by the name they are saved under."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trunk = trunk_names(model) & named.keys() if options.trunk_lr_ratio < 1 else set[str]()
    hidden = {name for name, p in named.items() if options.name == "muon" and _is_hidden(name, p)} - trunk
    rest, owned = [p for name, p in named.items() if name not in hidden | trunk], list(owned)
    found: dict[str, torch.optim.Optimizer] = {}
    if rest or owned:
        found["autoencoder"] = adamw(rest, options.lr, options.betas, options.weight_decay, undecayed=owned)
    if trunk:
        slow = [named[name] for name in named if name in trunk]
        found["autoencoder-trunk"] = adamw(
            slow, options.trunk_lr_ratio * options.lr, options.betas, options.weight_decay
        )
    if hidden:
        lr = options.muon_lr or options.lr
        found["autoencoder-muon"] = Muon(
            [named[name] for name in named if name in hidden], lr, weight_decay=options.weight_decay
        )
    return found


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Weights between the first and the last layers of either half; those and all vectors stay with AdamW, as Muon's authors advise."""
    return parameter.ndim >= 2 and not any(part in name for part in ("conv_in", "conv_out", "quant_conv"))


def learning_rate_scale(options: OptimizerOptions, images_seen: int, images: int, start: int = 0) -> float:
    """Learning rate over its peak after `images_seen` of `images`, in [0, 1].

    Linear from 0 over `warmup_images`, then constant, or half a cosine down to `final_lr_ratio` (Loshchilov & Hutter 2017, eq. 5).
    A network that begins at image `start` warms up from there.
    """
    warm = min(1.0, (images_seen - start + 1) / options.warmup_images) if options.warmup_images else 1.0
    if options.schedule == "constant":
        return warm
    span = max(1, images - options.warmup_images)
    progress = min(1.0, max(0, images_seen - options.warmup_images) / span)
    return warm * (
        options.final_lr_ratio + (1 - options.final_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
