"""Shards of images in, shards of latents out: streamed, in order, whole or not there at all.

A sample `KEY.jpg, KEY.txt` becomes

    KEY.latent.safetensors   mean, logvar[, mean_flip, logvar_flip] [z, h, w], raw (no scaling), in the stored type
    KEY.latent.json          what the image was, and which part of it the latent shows
    KEY.txt                  byte for byte, as is every member but the image (KEY.jpg too when images are kept); extensions
                             become lower case, as WebDataset reads them

Packed, the latents are not in the tar but stacked in NAME.latents-HxW.safetensors beside it, and KEY.latent.json has their row.

Batches never cross a shard and the last ones are padded to full size, so a shard's bytes depend on its input, the model and the
batch size alone. Tar headers carry no time, owner or machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae.data.headers import MAX_PIXELS
from latentae.encoding.encoders import Encoder, PatientEncoder
from latentae.encoding.output import NON_FINITE, Encoded, Event, Finished, write_shards
from latentae.encoding.pipeline import Crew
from latentae.encoding.samples import (
    JSON_MEMBER,
    LATENT_MEMBER,
    UNREADABLE,
    Batch,
    Begin,
    End,
    Skipped,
    batches,
    decode,
    read_shards,
)
from latentae.encoding.sidecar import Sidecar
from latentae.encoding.store import Store

__all__ = [
    "DTYPES",
    "JSON_MEMBER",
    "LATENT_MEMBER",
    "NON_FINITE",
    "UNREADABLE",
    "Encoder",
    "ShardSettings",
    "encode_shard",
    "encode_shards",
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AHEAD = 2  # batches that wait for the encoder, and as many for the writer


@dataclass(frozen=True)
class ShardSettings:
    """What is the same for every shard of a job."""

    resolution: int
    """Side in pixels of the square that is encoded, or of the square bucket."""
    dtype: str
    """Stored type, one of DTYPES."""
    batch_size: int
    keep_images: bool
    channels: int
    """Latent channels, z."""
    fingerprint: str
    flip: bool = False
    """Store the posterior of the mirrored image too."""
    packed: bool = False
    """Stack the latents beside the tar."""
    buckets: tuple[tuple[int, int], ...] = ()
    """(height, width) in pixels to choose from by aspect ratio; none is the square alone."""
    workers: int = 0
    """Threads that decode; with 0 nothing runs beside the encoder."""
    in_channels: int = 3
    """Of the images: 1 (gray), 3 (RGB) or 4 (RGB and alpha)."""
    pin: bool = False
    """Hand the encoder images in page-locked memory, for a GPU."""
    max_pixels: int = MAX_PIXELS
    """Of an image; larger ones are skipped and recorded as unreadable."""


def encode_shard(
    source: str | Path,
    store: Store,
    name: str,
    encoder: Encoder,
    settings: ShardSettings,
    advance: Callable[[int], None] = lambda count: None,
) -> Sidecar:
    """Encode one shard and vouch for it with a sidecar; see `encode_shards`.

    Args:
        source: tar of images, local or remote.
        store: the output folder.
        name: of the output in it.
        encoder: the model.
        settings: see ShardSettings.
        advance: called with the number of samples of each batch done.

    Returns:
        The sidecar.
    """
    (sidecar,) = encode_shards([(str(source), name)], store, encoder, settings, advance)
    return sidecar


def encode_shards(
    work: Iterable[tuple[str, str]],
    store: Store,
    encoder: Encoder,
    settings: ShardSettings,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Sidecar]:
    """Encode shards one after the other; reading, decoding, encoding and writing overlap, also from one shard to the next.

    The encoder runs in the caller's thread. `work` (source and name in the store) is asked for the next shard when the one before
    has been read.

    Yields:
        The sidecar of each shard once it is in place, in order.

    Raises:
        ShardError: a source is damaged, changes, or already holds latents. The shards before it are finished first.
        ModelError: memory does not suffice for a single image.
        OutputError: `store` can't be written.
    """
    buckets = settings.buckets or ((settings.resolution, settings.resolution),)
    decoding = partial(
        decode,
        buckets=buckets,
        channels=settings.in_channels,
        keep_images=settings.keep_images,
        max_pixels=settings.max_pixels,
    )
    writing = partial(
        write_shards,
        store=store,
        channels=settings.channels,
        fingerprint=settings.fingerprint,
        packed=settings.packed,
        flip=settings.flip,
        batch_size=settings.batch_size,
    )
    with Crew(settings.workers) as crew:
        decoded = crew.map(decoding, read_shards(work), 2 * settings.workers)
        ready = crew.ahead(batches(decoded, settings.batch_size, settings.pin), AHEAD)
        yield from crew.behind(writing, _encode(ready, encoder, settings, advance), AHEAD)


def _encode(
    items: Iterator[Begin | Batch | Skipped | End],
    encoder: Encoder,
    settings: ShardSettings,
    advance: Callable[[int], Any],
) -> Iterator[Event]:
    patient = PatientEncoder(encoder, settings.batch_size)
    for item in items:
        if isinstance(item, Batch):
            latents = _latents(item.images, len(item.samples), patient, settings)
            yield Encoded(item.samples, latents)
            advance(len(item.samples))
        elif isinstance(item, End):
            yield Finished(item, patient.smaller)
            patient.smaller = []
        else:
            yield item
            advance(1 if isinstance(item, Skipped) else 0)


def _latents(images: Tensor, count: int, encoder: Encoder, settings: ShardSettings) -> dict[str, Tensor]:
    """The first `count` rows in the stored type; the others only fill the batch."""
    dtype = DTYPES[settings.dtype]
    mean, logvar = encoder(images)
    latents = {"mean": mean[:count].to(dtype), "logvar": logvar[:count].to(dtype)}
    if settings.flip:
        mean, logvar = encoder(images.flip(3))
        latents |= {"mean_flip": mean[:count].to(dtype), "logvar_flip": logvar[:count].to(dtype)}
    return latents
