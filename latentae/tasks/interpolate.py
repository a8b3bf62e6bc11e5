"""The task `interpolate`: the pictures between two pictures, as a strip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.headers import MAX_PIXELS
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import RecipeError
from latentae.measures.latents.mixing import MODES, mix_latents
from latentae.pages.images import image_grid
from latentae.progress import say
from latentae.tasks.inputs import Item, open_images, read_labels
from latentae.tasks.network import Batch, Network
from latentae.tasks.pictures import check_png, enlarge, rgb, write_noted_png

__all__ = ["interpolate"]


def interpolate(
    model: str | Path,
    a: str | Path,
    b: str | Path,
    out: str | Path = "strip.png",
    *,
    steps: int = 9,
    mode: str = "linear",
    resolution: int | None = None,
    weights: str = "ema",
    device: str = "auto",
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Decode the latents between those of two images: a strip, over the cross-fade of the two reconstructions to compare with.

    Args:
        model: run folder, checkpoint or exported folder.
        a: image file.
        b: image file.
        out: the PNG to write; an existing one is replaced.
        steps: pictures, the two reconstructions included.
        mode: "linear", or "spherical" about the model's shift_factor, on which latents stay as long as those of a variational model are.
        resolution: side of the centre square of both; the model's own when not given.
        weights: "ema" or "raw".
        device: "auto", "cpu", "cuda" or "cuda:N".
        max_pixels: refuse images of more pixels by their header.

    Returns:
        `file`, and how it was made, which the PNG says in its text chunk "latentae", too.

    Raises:
        LatentAEError: the model, an image or an option can't be used.
    """
    file = check_png(out)
    if steps < 2 or mode not in MODES:
        raise RecipeError(
            f"steps is {steps} and mode {mode!r}, expected 2 or more, and one of {', '.join(MODES)}"
        )
    network = Network(model, weights, device)
    size = network.source.resolution if resolution is None else resolution
    network.check(size, 1)
    ends = [_read(network, path, size, max_pixels) for path in (a, b)]
    first, last = (network.encode(Batch([item], item.image[None])).mode()[0].cpu() for item in ends)
    latents = torch.stack(
        [
            mix_latents(first, last, step / (steps - 1), mode, network.config.shift_factor)
            for step in range(steps)
        ]
    )
    between = network.decode(latents)
    fade = [_fade(between[0], between[-1], step / (steps - 1)) for step in range(steps)]
    note = {
        "task": "interpolate",
        "mode": mode,
        "steps": steps,
        "a": ends[0].key,
        "b": ends[1].key,
        "model": network.fingerprint,
    }
    write_noted_png(
        file,
        image_grid([[enlarge(rgb(image)) for image in row] for row in (between, fade)], columns=steps),
        note,
    )
    say(f"interpolate: {mode}, {steps} pictures in {file}, over the cross-fade of its ends")
    return {"file": str(file), **note}


def _read(network: Network, path: str | Path, resolution: int, max_pixels: int) -> Item:
    no_labels = read_labels("none")[0]
    images = open_images([path], "images", max_pixels)
    return next(images.items([0], no_labels, channels=network.channels, resolution=resolution))


def _fade(a: Tensor, b: Tensor, share: float) -> Tensor:
    return to_uint8(torch.lerp(to_float(a), to_float(b), share))
