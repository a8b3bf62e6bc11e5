"""Read one shard from end to end and make its index. Loads no torch, so that indexing starts at once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from latentae.data.headers import IMAGE_EXTENSIONS, image_size
from latentae.data.sources import ByteStream, is_remote, read_range, shown, size_of, stream
from latentae.data.tables import TableBuilder
from latentae.data.tars import BLOCK, Member, Problem, Reader, Sample, group, walk
from latentae.errors import Interrupted, ShardError

__all__ = ["SAMPLE_DAMAGE", "Scan", "marks_match", "scan"]

SAMPLE_DAMAGE = ("twice", "outside", "name")  # problems of samples that are damaged and not used
_NEAR = 1 << 13  # bytes read at once where only headers are wanted: a header and the beginning of an image


@dataclass(frozen=True)
class Scan:
    """What was found in a shard."""

    data: bytes
    """The index file."""
    samples: int
    bytes: int
    sha256: str
    headers: str
    problems: tuple[Problem, ...]


def scan(
    path: str,
    *,
    hashed: bool,
    place: str = "",
    stop: threading.Event | None = None,
    advance: Callable[[int], object] = lambda count: None,
) -> Scan:
    """Index one shard: walk its headers, measure its images by their headers, hash it in the same pass.

    Args:
        path: local or remote.
        hashed: read every byte and hash them; else, for a local shard, only headers are read. Remote shards are read whole anyway.
        place: where the shard lies, for the record; empty where the index lies beside it.
        stop: when set, the scan ends with Interrupted.
        advance: called with the number of bytes passed.

    Raises:
        ShardError: the shard is missing, cut short, damaged or no tar.
    """
    size = size_of(path)
    digest = hashlib.sha256() if hashed or is_remote(path) else None
    builder = TableBuilder()
    if digest is None:
        reader = Reader(lambda start, end: read_range(path, start, end), size, chunk=_NEAR)
        end = _collect(reader, path, builder, _Pace(reader, stop, advance))
    else:
        with stream(path) as file:
            reader = Reader(lambda start, end: _exactly(file, end - start, path), size, observe=digest.update)
            end = _collect(reader, path, builder, _Pace(reader, stop, advance))
    if size_of(path) != size:
        raise ShardError(f"shard {shown(path)} changed while it was read; index it again when it is whole")
    sha256 = digest.hexdigest() if digest else ""
    data = builder.to_bytes(
        bytes=size, sha256=sha256, marks=_marks(path, [*builder.ends(), end]), place=place
    )
    return Scan(data, builder.samples, size, sha256, builder.headers(), tuple(builder.problems))


@dataclass
class _Pace:
    """Reports how far a reader has come, and ends the scan when asked to."""

    reader: Reader
    stop: threading.Event | None
    advance: Callable[[int], object]
    passed: int = 0

    def __call__(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Interrupted("indexing was stopped; the same command goes on from what is finished")
        self.advance(self.reader.position - self.passed)
        self.passed = self.reader.position


def _exactly(file: ByteStream, count: int, path: str) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise ShardError(f"shard {shown(path)} changed while it was read; index it again when it is whole")
    return data


def _collect(reader: Reader, path: str, builder: TableBuilder, pace: _Pace) -> int:
    """Fill the builder with the samples of a shard; returns where its end-of-archive block is."""
    end = 0
    sizes: dict[int, tuple[int, int] | None] = {}  # first byte of an image -> height and width
    bare: list[Sample] | None = []  # samples without an image, as long as none with one has come

    def members() -> Iterator[Member]:
        nonlocal end
        for member in walk(reader, shown(path)):
            pace()
            end = member.end
            if member.kind == "file" and member.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS:
                sizes[member.offset] = image_size(
                    reader.take, member.size, lambda count: reader.skip_to(reader.position + count)
                )
            yield member

    for sample in group(members(), builder.report):
        image = _image(sample)
        if image is None and bare is not None:
            bare.append(sample)
        elif image is None:
            builder.report(_without_image(sample))
        else:
            for other in bare or ():
                builder.report(_without_image(other))
            bare = None
            size = sizes.get(image)
            if size is None:
                builder.report(
                    Problem("image", sample.start, sample.key, "the header of its image can't be read")
                )
            builder.add(sample, size)
        for offset in [offset for offset in sizes if offset < sample.end]:
            del sizes[offset]
    for sample in bare or ():  # a shard of latents, say: its samples are samples all the same
        builder.add(sample, None)
    pace()
    return end


def _image(sample: Sample) -> int | None:
    """Where the image of a sample begins: of several the first kind in the order that decoding prefers."""
    there = {extension: offset for extension, offset, _ in sample.members}
    return next((there[extension] for extension in IMAGE_EXTENSIONS if extension in there), None)


def _without_image(sample: Sample) -> Problem:
    there = ", ".join(extension for extension, _, _ in sample.members)
    return Problem("left_out", sample.start, sample.key, f"a sample without an image (it has {there})")


def _marks(path: str, places: list[int]) -> list[list[int | str]]:
    """Hashes of the blocks at some places of a local shard: they show that the shard has changed when its size does not."""
    return [] if is_remote(path) else [[start, _block_hash(path, start)] for start in sorted(set(places))]


def marks_match(path: str, marks: list[list[Any]]) -> bool:
    """Whether a local shard still has the blocks that its index saw: its first, its last and its end-of-archive header."""
    return is_remote(path) or all(_block_hash(path, int(start)) == digest for start, digest in marks)


def _block_hash(path: str, start: int) -> str:
    return hashlib.blake2b(read_range(path, start, start + BLOCK), digest_size=8).hexdigest()
