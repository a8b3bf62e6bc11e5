"""Pickled checkpoints, read as plain tensors by torch's restricted unpickler, which runs no code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.errors import ModelError

__all__ = ["PICKLES", "read_pickle"]

PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def read_pickle(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint, or of its "state_dict"; what else it holds is left out.

    Raises:
        ModelError: it is damaged, holds no dict, or asks for more of Python than tensors.
    """
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the unpickler fail in any way
        raise ModelError(
            f"could not read {file} as plain tensors ({type(error).__name__}: {_first_sentence(error)}); it is damaged or asks for "
            "more of Python than that, which is refused: use a .safetensors copy"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, expected a dict of tensors, or one under 'state_dict'")
    return {key: value for key, value in content.items() if isinstance(key, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor that owns all of its values; a file can also claim terabytes by a stride of zero."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(". ")[0]
    return text if len(text) < 200 else text[:200] + "..."
