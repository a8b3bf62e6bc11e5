"""The task `interpolate`: the pictures between two pictures, as a strip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import RecipeError
from latentae.measures.latents.mixing import MODES, mix_latents
from latentae.options import verb
from latentae.pages.images import image_grid
from latentae.progress import say
from latentae.tasks.inputs import Item, open_images, read_labels
from latentae.tasks.network import Batch, Network
from latentae.tasks.options import InterpolateOptions
from latentae.tasks.pictures import check_png, enlarge, rgb, write_noted_png

__all__ = ["interpolate"]


@verb(InterpolateOptions)
def interpolate(options: InterpolateOptions) -> dict[str, Any]:
    """Decode the latents between those of two images: a strip, over the cross-fade of the two reconstructions to compare with.

    Returns:
        `file`, and how it was made, which the PNG says in its text chunk "latentae", too.

    Raises:
        LatentAEError: the model, an image or an option can't be used.
    """
    file = check_png(options.out)
    if options.steps < 2 or options.mode not in MODES:
        raise RecipeError(
            f"steps is {options.steps} and mode {options.mode!r}, expected 2 or more, and one of {', '.join(MODES)}"
        )
    network = Network(options.model, options.weights, options.device)
    size = network.source.resolution if options.resolution is None else options.resolution
    network.check(size, 1)
    ends = [_read(network, path, size, options.max_pixels) for path in (options.a, options.b)]
    first, last = (network.encode(Batch([item], item.image[None])).mode()[0].cpu() for item in ends)
    latents = torch.stack(
        [
            mix_latents(first, last, step / (options.steps - 1), options.mode, network.config.shift_factor)
            for step in range(options.steps)
        ]
    )
    between = network.decode(latents)
    fade = [_fade(between[0], between[-1], step / (options.steps - 1)) for step in range(options.steps)]
    note = {
        "task": "interpolate",
        "mode": options.mode,
        "steps": options.steps,
        "a": ends[0].key,
        "b": ends[1].key,
        "model": network.fingerprint,
    }
    write_noted_png(
        file,
        image_grid(
            [[enlarge(rgb(image)) for image in row] for row in (between, fade)], columns=options.steps
        ),
        note,
    )
    say(f"interpolate: {options.mode}, {options.steps} pictures in {file}, over the cross-fade of its ends")
    return {"file": str(file), **note}


def _read(network: Network, path: str | Path, resolution: int, max_pixels: int) -> Item:
    no_labels = read_labels("none")[0]
    images = open_images([path], "images", max_pixels)
    return next(images.items([0], no_labels, channels=network.channels, resolution=resolution))


def _fade(a: Tensor, b: Tensor, share: float) -> Tensor:
    return to_uint8(torch.lerp(to_float(a), to_float(b), share))
