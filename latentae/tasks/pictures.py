"""Pictures of tasks: thumbnails, heat maps, and PNG files with a note of their settings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentae.errors import ImageError
from latentae.files import atomic_file
from latentae.pages.images import image_grid, pil_image

__all__ = ["NOTE", "check_png", "heat_picture", "thumbnails", "write_noted_png"]

NOTE = "latentae"  # the text chunk of a PNG
_SHORT_SIDE = 128  # of a thumbnail, in pixels, about


def check_png(file: str | Path) -> Path:
    """The path of a picture to write.

    Raises:
        ImageError: it does not end in .png.
    """
    if Path(file).suffix.lower() != ".png":
        raise ImageError(f"the picture is written as PNG, got {file}; give a name that ends in .png")
    return Path(file)


def thumbnails(rows: Sequence[Sequence[Tensor]], columns: int = 8) -> Tensor:
    """Rows of uint8 images [1, 3 or 4, H, W] as one picture; small images are enlarged."""
    return image_grid([[_enlarged(_rgb(image)) for image in row] for row in rows], columns=columns)


def _rgb(image: Tensor) -> Tensor:
    return image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]


def _enlarged(image: Tensor) -> Tensor:
    times = max(_SHORT_SIDE // min(image.shape[1:]), 1)
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def heat_picture(heat: Tensor) -> Tensor:
    """[H, W] from 0 (black) to 1 (yellow) as uint8 [3, H, W] in matplotlib's "inferno"."""
    from matplotlib import colormaps

    levels = (heat.float().clamp(0.0, 1.0) * 255).round().byte().cpu().numpy()
    return torch.from_numpy(colormaps["inferno"](levels, bytes=True)[..., :3]).permute(2, 0, 1).contiguous()


def write_noted_png(file: Path, image: Tensor, note: Mapping[str, Any]) -> None:
    """Write uint8 [C, H, W] as a PNG whose text chunk "latentae" holds `note` as JSON."""
    info = PngInfo()
    info.add_text(NOTE, json.dumps(note))
    with atomic_file(file) as temporary:
        pil_image(image).save(temporary, "PNG", optimize=True, pnginfo=info)
