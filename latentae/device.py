"""The device of a verb."""

from __future__ import annotations

import os

import torch

from latentae.errors import RecipeError

__all__ = ["choose_device"]


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name; "auto" is CUDA if available, else the CPU.

    With several processes per machine, "auto" gives each its own GPU.

    Raises:
        RecipeError: an unknown device, or a GPU that torch does not see.
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
            f"device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices; give auto or cpu"
        )
    return device
