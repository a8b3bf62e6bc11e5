"""The verb `interpolate`: decode latents between those of two images to a strip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from latentae.data.transforms import to_float, to_uint8
from latentae.measures.latents.diagnose import mix_latents
from latentae.options import verb
from latentae.progress import say
from latentae.tasks.inputs import open_images
from latentae.tasks.network import Batch, Network
from latentae.tasks.options import InterpolateOptions
from latentae.tasks.outputs import check_png, thumbnails, write_noted_png

__all__ = ["interpolate"]


@verb(InterpolateOptions)
def interpolate(options: InterpolateOptions) -> dict[str, Any]:
    """Decode latents between those of two images, above the cross-fade of both ends.

    Returns:
        `file` and the settings, which are also in the PNG's text chunk "latentae".

    Raises:
        LatentAEError: the model, an image or an option can't be used.
    """
    file, network = check_png(options.out), Network(options)
    ends = [_read(network, path, options.max_pixels) for path in (options.a, options.b)]
    first, last = (network.encode(end).mode()[0].cpu() for end in ends)
    shares = [step / (options.steps - 1) for step in range(options.steps)]
    shift = network.config.shift_factor
    latents = torch.stack([mix_latents(first, last, share, options.mode, shift) for share in shares])
    between = network.decode(latents)
    a, b = to_float(between[0]), to_float(between[-1])
    fade = [to_uint8(torch.lerp(a, b, share)) for share in shares]
    note = {
        "task": "interpolate",
        "mode": options.mode,
        "steps": options.steps,
        "a": ends[0].items[0].key,
        "b": ends[1].items[0].key,
        "model": network.fingerprint,
    }
    write_noted_png(file, thumbnails([between, fade], columns=options.steps), note)
    say(f"interpolate: {options.mode}, {options.steps} pictures in {file}, above the cross-fade of both ends")
    return {"file": str(file), **note}


def _read(network: Network, path: str | Path, max_pixels: int) -> Batch:
    images = open_images([path], "images", max_pixels)
    return next(network.batches(images, [0], resolution=network.side))
