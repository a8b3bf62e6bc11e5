"""Pictures of tasks: heat maps, enlarged thumbnails, and PNG files that say how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentae.errors import ImageError
from latentae.files import atomic_file
from latentae.pages.images import pil_image

__all__ = ["NOTE", "check_png", "enlarge", "heat_picture", "rgb", "write_noted_png"]

NOTE = "latentae"  # the text chunk of a PNG
_SHOWN = 128  # pixels of the short side of a thumbnail, at least


def check_png(file: str | Path) -> Path:
    """The path of a picture to write; ImageError unless it ends in .png."""
    if Path(file).suffix.lower() != ".png":
        raise ImageError(f"the picture is written as PNG, got {file}; give a name that ends in .png")
    return Path(file)


def rgb(image: Tensor) -> Tensor:
    """uint8 [1, 3 or 4, H, W] -> [3, H, W]; alpha is left out."""
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]


def enlarge(image: Tensor) -> Tensor:
    """Repeat the pixels of a small [C, H, W] image until its short side is about 128: an 8 x 8 digit can't be seen otherwise."""
    times = max(_SHOWN // min(image.shape[1:]), 1)
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def heat_picture(heat: Tensor) -> Tensor:
    """[H, W] from 0 (black) to 1 (yellow) in matplotlib's "inferno", whose lightness rises evenly -> uint8 [3, H, W]."""
    from matplotlib import colormaps

    table = torch.tensor(
        [colormaps["inferno"](level, bytes=True)[:3] for level in range(256)], dtype=torch.uint8
    )
    levels = (heat.float().clamp(0.0, 1.0) * 255).round().long().cpu()
    return table[levels].permute(2, 0, 1).contiguous()


def write_noted_png(file: Path, image: Tensor, note: Mapping[str, Any]) -> None:
    """Write uint8 [C, H, W] as a PNG whose text chunk "latentae" holds `note` as JSON."""
    info = PngInfo()
    info.add_text(NOTE, json.dumps(note))
    with atomic_file(file) as temporary:
        pil_image(image).save(temporary, "PNG", optimize=True, pnginfo=info)
