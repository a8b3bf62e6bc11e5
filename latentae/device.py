"""Which device a verb runs on."""

from __future__ import annotations

import os

import torch

from latentae.errors import RecipeError

__all__ = ["choose_device"]


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; any other name is torch's own.

    Of several processes that a launcher started on one machine, `auto` gives each a GPU of its own.

    Raises:
        RecipeError: an unknown device, or CUDA where there is none.
    """
    if name == "auto":
        rank = os.environ.get("LOCAL_RANK")
        return torch.device((f"cuda:{rank}" if rank else "cuda") if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"unknown device {name!r}; give auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"device {name} asked for, but torch sees {torch.cuda.device_count()} CUDA devices; give auto or cpu"
        )
    return device
