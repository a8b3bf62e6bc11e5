"""A shard of images on its way to the encoder: read once from end to end, decoded, cropped, and joined to batches of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from latentae.data.decode import MAX_PIXELS, decode_sample, image_extension
from latentae.data.selection import Bucket, assign_buckets
from latentae.data.shard_files import RawSample
from latentae.data.sources import ByteStream, shown, size_of, stream
from latentae.data.tars import Member, Problem, Reader, group, walk
from latentae.data.transforms import crop_to_bucket
from latentae.encoding.places import JSON_MEMBER, LATENT_MEMBER
from latentae.encoding.sidecar import ShardFile
from latentae.errors import ImageError, ShardError

__all__ = [
    "UNREADABLE",
    "Batch",
    "Begin",
    "Decoded",
    "End",
    "Skipped",
    "Source",
    "batches",
    "decode",
    "read_shards",
]

UNREADABLE = "unreadable image"
SPAN = (
    8  # batches: a sample waits no longer for others of its bucket, so that little is held back at any time
)


@dataclass(frozen=True)
class Begin:
    """A shard begins."""

    source: str
    name: str
    bytes: int


@dataclass(frozen=True)
class End:
    """A shard has been read to its end."""

    input: ShardFile


@dataclass(frozen=True)
class Failure:
    """Reading has failed; what came before is good."""

    error: Exception


@dataclass(frozen=True)
class Skipped:
    """A sample that has no latent."""

    position: int
    """In the shard, from 0."""
    key: str
    reason: str
    message: str


@dataclass(frozen=True)
class Source:
    """A sample that has an image."""

    position: int
    """In the shard, from 0."""
    key: str
    members: dict[str, bytes]
    """What goes to the output unchanged."""
    info: dict[str, Any]
    """What the image was, and which part of it the latent shows."""


@dataclass(frozen=True)
class Decoded:
    """A sample on its way to a batch."""

    sample: Source
    image: Tensor
    """uint8 [C, *bucket]."""


@dataclass(frozen=True)
class Batch:
    """Samples of one size, and their images, padded to a full batch."""

    samples: list[Source]
    images: Tensor
    """uint8 [batch_size, C, H, W], channels_last."""


@dataclass(frozen=True)
class Undecoded:
    """A sample as it was read."""

    position: int
    raw: RawSample


def read_shards(work: Iterable[tuple[str, str]]) -> Iterator[Begin | Undecoded | End | Failure]:
    """The samples of shards, local or remote, each in one pass that also hashes it.

    Args:
        work: source and name of each shard; the next one is asked for when the one before has been read.
    """
    for source, name in work:
        try:
            yield from _read(source, name)
        except Exception as error:  # handed on, so that it comes after all samples that were read before
            yield Failure(error)
            return


def _read(source: str, name: str) -> Iterator[Begin | Undecoded | End]:
    size, digest, count = size_of(source), hashlib.sha256(), 0
    yield Begin(source, name, size)
    with stream(source) as file:
        reader = Reader(lambda start, stop: _exactly(file, stop - start, source), size, observe=digest.update)
        data: dict[int, bytes] = {}

        def members() -> Iterator[Member]:
            for member in walk(reader, shown(source)):
                if member.kind == "file":
                    data[member.offset] = reader.take(member.size)
                yield member

        for sample in group(members(), lambda problem: _refuse(source, problem)):
            raw: RawSample = {"__key__": sample.key, "__url__": shown(source)}
            raw.update((extension, data[offset]) for extension, offset, _ in sample.members)
            for offset in [offset for offset in data if offset < sample.end]:
                del data[offset]
            yield Undecoded(count, raw)
            count += 1
    yield End(ShardFile(samples=count, bytes=size, sha256=digest.hexdigest()))


def _exactly(file: ByteStream, count: int, source: str) -> bytes:
    data = file.read(count)
    if len(data) < count:
        raise ShardError(
            f"shard {shown(source)} changed while it was read; run the same command again once it is complete"
        )
    return data


def _refuse(source: str, problem: Problem) -> None:
    if problem.code in ("twice", "outside"):
        raise ShardError(
            f"shard {shown(source)} holds {problem.name!r}, which can't be used ({problem.reason}); write it again with unique, plain keys"
        )


def decode(
    item: Any, buckets: tuple[Bucket, ...], channels: int, keep_images: bool, max_pixels: int = MAX_PIXELS
) -> Any:
    """An Undecoded becomes Decoded, Skipped, or a Failure where it already holds a latent; anything else stays."""
    if not isinstance(item, Undecoded):
        return item
    key = str(item.raw["__key__"])
    members = {name: value for name, value in item.raw.items() if not name.startswith("__")}
    if LATENT_MEMBER in members or JSON_MEMBER in members:
        return Failure(
            ShardError(
                f"{item.raw['__url__']}: sample {key} already holds a latent; give the shards of images"
            )
        )
    try:
        short = max(side for bucket in buckets for side in bucket)
        decoded = decode_sample(item.raw, channels=channels, max_pixels=max_pixels, short=short)
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
    if not keep_images:
        del members[extension]
    return Decoded(Source(item.position, key, members, info), crop_to_bucket(decoded.image, bucket))


def geometry(height: int, width: int, bucket: Bucket) -> dict[str, list[int]]:
    """What crop_to_bucket did to an image, as [height, width] and, in the resized image, [top, left, height, width].

    Of a strip more than four times as long as its bucket the ends were cut before it was resized: `crop` is then right to a pixel.
    """
    high, wide = bucket
    if width * high >= wide * height:
        resized = [high, max(int(high * width / height), wide)]
    else:
        resized = [max(int(wide * height / width), high), wide]
    top, left = (round((side - cut) / 2) for side, cut in zip(resized, bucket, strict=True))
    return {
        "original_size": [height, width],
        "resized_size": resized,
        "crop": [top, left, high, wide],
        "bucket": [high, wide],
    }


@dataclass
class _Waiting:
    """Samples of one shard that wait for a full batch, by bucket; the longest waiting bucket first."""

    buckets: dict[tuple[int, ...], list[Decoded]] = field(default_factory=dict)

    def add(self, sample: Decoded) -> list[Decoded]:
        waiting = self.buckets.setdefault(tuple(sample.image.shape[1:]), [])
        waiting.append(sample)
        return waiting

    def late(self, before: int) -> bool:
        return bool(self.buckets) and next(iter(self.buckets.values()))[0].sample.position < before

    def take(self) -> list[Decoded]:
        return self.buckets.pop(next(iter(self.buckets)))


def batches(items: Iterator[Any], size: int, pin: bool) -> Iterator[Begin | Batch | Skipped | End]:
    """Join decoded samples of one size; no batch crosses a shard, and which samples meet depends on the shard alone.

    Args:
        items: as `decode` gives them.
        size: images of a batch.
        pin: make the images in page-locked memory, from which a GPU reads beside its work.
    """
    waiting = _Waiting()
    for item in items:
        if isinstance(item, Failure):
            raise item.error
        if isinstance(item, Decoded):
            if len(full := waiting.add(item)) == size:
                del waiting.buckets[tuple(item.image.shape[1:])]
                yield _join(full, size, pin)
            while waiting.late(item.sample.position - SPAN * size):
                yield _join(waiting.take(), size, pin)
            continue
        if isinstance(item, End):
            while waiting.buckets:
                yield _join(waiting.take(), size, pin)
        yield item


def _join(samples: list[Decoded], size: int, pin: bool) -> Batch:
    shape = (size, *samples[0].image.shape)
    images = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last, pin_memory=pin)
    for row, sample in zip(images, samples, strict=False):
        row.copy_(sample.image)
    images[len(samples) :] = 0
    return Batch([sample.sample for sample in samples], images)
