"""Images of other channels, and files as Pillow writes and reads them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def channels_of(images: Tensor, channels: int) -> Tensor:
    """RGB images [N, 3, H, W] as gray ones, themselves, or with a smooth alpha."""
    if channels == 1:
        return images[:, :1].contiguous()
    return images if channels == 3 else torch.cat([images, images.flip(3)[:, :1]], 1)


def pillow_file(image: Tensor, format: str, mode: str = "", **options: Any) -> bytes:
    """What Pillow itself writes of uint8 [C, H, W]."""
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy().squeeze())
    picture, file = Image.fromarray(pixels), io.BytesIO()
    (picture.convert(mode) if mode else picture).save(file, format, **options)
    return file.getvalue()


def pillow_pixels(data: bytes, channels: int) -> Tensor:
    with Image.open(io.BytesIO(data)) as picture:
        pixels = np.array(picture.convert(MODES[channels]))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], channels)).permute(2, 0, 1)
