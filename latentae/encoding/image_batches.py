"""Shards of images to batches: read once, decoded, cropped and grouped by image size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from latentae.data.decode import decode_sample, image_extension
from latentae.data.order import Bucket, assign_buckets
from latentae.data.shard_files import RawSample
from latentae.data.sources import read_exactly, shown, size_of, stream
from latentae.data.tars import Member, Reader, refuse_damaged, walk_samples
from latentae.data.transforms import covering_size, crop_to_bucket
from latentae.encoding.latent_shard import JSON_MEMBER, LATENT_MEMBER
from latentae.encoding.plan import Shard, ShardSettings
from latentae.encoding.sidecar import ShardFile
from latentae.errors import ImageError, ShardError

__all__ = ["UNREADABLE", "Batch", "Skipped", "Source", "batches", "decode", "geometry", "read_shards"]

UNREADABLE = "unreadable image"
SPAN = 8  # batches that a sample waits for others of its bucket, which bounds memory


@dataclass(frozen=True)
class Skipped:
    """A sample without a latent."""

    position: int
    """In the shard, from 0."""
    key: str
    reason: str
    message: str


@dataclass(frozen=True)
class Source:
    """A sample with an image."""

    position: int
    """In the shard, from 0."""
    key: str
    members: dict[str, bytes]
    """Members copied to the output."""
    info: dict[str, Any]
    """Content of `latent.json`: the image and the crop that the latent shows."""


class Undecoded(NamedTuple):
    """A sample as it was read, and its position in the shard."""

    position: int
    raw: RawSample


class Decoded(NamedTuple):
    """A sample and its cropped image, uint8 [C, *bucket]."""

    sample: Source
    image: Tensor


class Batch(NamedTuple):
    """Samples of one size and their images, padded to uint8 [B, C, H, W], channels_last."""

    samples: list[Source]
    images: Tensor


Input = Shard | Undecoded | ShardFile | Exception
"""A Shard begins, its samples follow, a ShardFile ends it; an Exception ends the input."""


def read_shards(shards: Iterable[Shard]) -> Iterator[Input]:
    """Read local or remote shards in one pass each, which also hashes them.

    Yields:
        For each shard the shard with its current size, its samples, and size, SHA-256 and number of
        samples. An error is yielded, so that it does not overtake the samples before it.
    """
    for shard in shards:
        try:
            yield from _read(shard)
        except Exception as error:
            yield error
            return


def _read(shard: Shard) -> Iterator[Input]:
    source, name = shard.source, shown(shard.source)
    size, digest, count = size_of(source), hashlib.sha256(), 0
    yield replace(shard, bytes=size)
    with stream(source) as file:
        reader = Reader(partial(read_exactly, source, file), size, observe=digest.update)

        def take(member: Member) -> bytes | None:
            return reader.take(member.size) if member.kind == "file" else None

        for sample, members in walk_samples(reader, name, take, partial(refuse_damaged, name)):
            yield Undecoded(count, {"__key__": sample.key, "__url__": name, **members})
            count += 1
    yield ShardFile(samples=count, bytes=size, sha256=digest.hexdigest())


def decode(item: Input, settings: ShardSettings) -> Any:
    """Decode and crop an Undecoded sample; any other item is returned unchanged.

    Returns:
        Decoded, Skipped if the image is unreadable, or ShardError if the sample holds a latent.
    """
    if not isinstance(item, Undecoded):
        return item
    key, buckets = str(item.raw["__key__"]), settings.buckets
    members = {name: value for name, value in item.raw.items() if not name.startswith("__")}
    if LATENT_MEMBER in members or JSON_MEMBER in members:
        return ShardError(
            f"{item.raw['__url__']}: sample {key} already holds a latent; give the shards of images"
        )
    try:
        decoded = decode_sample(
            item.raw,
            channels=settings.in_channels,
            max_pixels=settings.options.max_pixels,
            short=max(map(max, buckets)),
        )
    except ImageError as error:
        return Skipped(item.position, key, UNREADABLE, str(error))
    height, width = decoded.size
    bucket = buckets[int(assign_buckets(height, width, buckets)) if len(buckets) > 1 else 0]
    extension = str(image_extension(item.raw))
    info = {
        "source": extension,
        "source_sha256": hashlib.sha256(members[extension]).hexdigest(),
        **geometry(height, width, bucket),
    }
    if not settings.options.keep_images:
        del members[extension]
    return Decoded(Source(item.position, key, members, info), crop_to_bucket(decoded.image, bucket))


def geometry(height: int, width: int, bucket: Bucket) -> dict[str, list[int]]:
    """The resize and crop of crop_to_bucket in pixels: [height, width], [top, left, height, width].

    `crop` refers to the resized image. It is exact to one pixel for images more than four times as
    long as their bucket, whose ends are cut before resizing.
    """
    resized = covering_size(height, width, bucket)
    top, left = (round((side - cut) / 2) for side, cut in zip(resized, bucket, strict=True))
    return {
        "original_size": [height, width],
        "resized_size": list(resized),
        "crop": [top, left, *bucket],
        "bucket": list(bucket),
    }


def batches(items: Iterator[Any], settings: ShardSettings) -> Iterator[Shard | Batch | Skipped | ShardFile]:
    """Group decoded samples of one size. Batches never cross shards and depend only on the shard.

    Args:
        items: results of `decode`.
        settings: gives the batch size and whether images go to page-locked memory.

    Raises:
        Exception: an error that `read_shards` or `decode` returned.
    """
    size = settings.options.batch_size
    waiting: dict[torch.Size, list[Decoded]] = {}  # by image size, the longest waiting first
    for item in items:
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Decoded):
            same = waiting.setdefault(item.image.shape, [])
            same.append(item)
            if len(same) == size:
                yield _join(waiting.pop(item.image.shape), settings)
            oldest = item.sample.position - SPAN * size
            while waiting and waiting[first := next(iter(waiting))][0].sample.position < oldest:
                yield _join(waiting.pop(first), settings)
            continue
        if isinstance(item, ShardFile):
            yield from (_join(samples, settings) for samples in waiting.values())
            waiting.clear()
        yield item


def _join(samples: list[Decoded], settings: ShardSettings) -> Batch:
    shape = (settings.options.batch_size, *samples[0].image.shape)
    images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=settings.pin)
    for row, sample in zip(images, samples, strict=False):
        row.copy_(sample.image)
    images[len(samples) :] = 0
    return Batch([sample.sample for sample in samples], images)
