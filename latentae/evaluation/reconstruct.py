"""The verb `reconstruct`: one picture of image files over their reconstructions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.data.decode import read_image
from latentae.data.headers import image_size
from latentae.data.transforms import pad_to_multiple, resize_and_center_crop, to_float, to_uint8
from latentae.device import choose_device
from latentae.errors import ImageError, ModelError
from latentae.evaluation.options import ReconstructOptions
from latentae.measures.metrics import check_finite, psnr
from latentae.models.base import Autoencoder
from latentae.models.pretrained import load_model
from latentae.options import verb
from latentae.pages.images import image_grid, write_png
from latentae.progress import Progress, say

__all__ = ["LONGEST_SIDE", "image_grid", "reconstruct"]

LONGEST_SIDE = 1024  # of larger images without a resolution; a photo would need tens of gigabytes


@verb(ReconstructOptions)
def reconstruct(options: ReconstructOptions) -> Path:
    """Write originals over their reconstructions as one PNG, and print the PSNR of each.

    Returns:
        `out`.

    Raises:
        ImageError: no image, or one that is missing or unreadable.
        ModelError: the model can't be loaded, is not RGB, or gives NaN.
    """
    if not options.images:
        raise ImageError("no images given; name one or more image files")
    if Path(options.out).suffix.lower() != ".png":
        raise ImageError(f"the picture is written as PNG, got {options.out}; give a name that ends in .png")
    where = choose_device(options.device)
    network, source = load_model(options.model, options.weights, where)
    if source.config.in_channels != 3 or source.config.out_channels != 3:
        raise ModelError(
            f"the model has {source.config.in_channels} channels in and {source.config.out_channels} out, "
            "expected RGB"
        )
    if options.resolution is not None:
        source.check_side(options.resolution)
    originals = [_prepare(Path(path), options.resolution, options.max_pixels) for path in options.images]
    with Progress("reconstructing", len(originals)) as progress:
        results = []
        for path, original in zip(options.images, originals, strict=True):
            results.append(_reconstruct(network, original, Path(path), where))
            progress.advance()
    write_png(options.out, image_grid([originals, results], columns=_columns(originals)))
    for path, original, result in zip(options.images, originals, results, strict=True):
        height, width = original.shape[1:]
        print(f"{path}: {float(psnr(result[None], original[None])):.2f} dB PSNR at {width} x {height}")
    say(f"wrote {options.out}: originals over reconstructions")
    return Path(options.out)


def _prepare(path: Path, resolution: int | None, max_pixels: int) -> Tensor:
    """Read an image and resize it to the size that is shown: uint8 [3, H, W]."""
    image = read_image(path, max_pixels=max_pixels, short=resolution or LONGEST_SIDE)
    if resolution is not None:
        return resize_and_center_crop(image, resolution)
    height, width = image.shape[1:]
    if max(height, width) > LONGEST_SIDE:
        ratio = LONGEST_SIDE / max(height, width)
        size = max(round(height * ratio), 1), max(round(width * ratio), 1)
        image = F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0]
        with path.open("rb") as file:  # the image may have been decoded at a reduced scale
            height, width = image_size(file.read, path.stat().st_size) or (height, width)
        say(
            f"{path}: {width} x {height} pixels, reduced to {size[1]} x {size[0]}; give --resolution to "
            "choose another size"
        )
    return image.contiguous()


@torch.inference_mode()
def _reconstruct(network: Autoencoder, image: Tensor, path: Path, device: torch.device) -> Tensor:
    height, width = image.shape[1:]
    x = pad_to_multiple(to_float(image[None].to(device)), network.config.downsampling)
    result = network.decode(network.encode(x).mode())[..., :height, :width]
    check_finite("reconstruction", [str(path)], result)
    return to_uint8(result)[0].cpu()


def _columns(images: Sequence[Tensor]) -> int:
    """At most 8 columns, and a picture about 4096 pixels wide."""
    return max(1, min(8, 4096 // max(image.shape[2] for image in images)))
