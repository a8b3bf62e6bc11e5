"""The verb `shards`: pack images or samples in memory into shards.

A shard gets its name only when it is complete, and `index.json` is written after the last shard.
The same input gives the same bytes: sorted order, fixed tar metadata, original image files.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import tarfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from latentae.data.builtin import BuiltinImages, is_builtin
from latentae.data.decode import decode_image, image_extension
from latentae.data.folder import ImageFolder, escape_key
from latentae.data.hf_dataset import ImageDataset, is_dataset
from latentae.data.options import ShardsOptions
from latentae.data.shard_index import (
    INDEX_NAME,
    SUFFIX,
    IndexFiles,
    ShardEntry,
    ShardIndex,
    entry_of,
    in_parallel,
    load_index,
    scan_shard,
    write_index,
)
from latentae.data.shrinking import shrink
from latentae.data.tars import add_member
from latentae.errors import DataError, ImageError, Interrupted, OutputError, RecipeError
from latentae.file_names import BAD_SAMPLES
from latentae.files import abandoned, atomic_file, read_json, write_text
from latentae.jobs import Job
from latentae.options import identity, verb
from latentae.progress import Progress, say

__all__ = ["ImageSource", "default_shard_size", "shards", "write_shards"]

_T = TypeVar("_T")
Members = Mapping[str, str | bytes]
"""One sample: "__key__" -> str, extension -> bytes."""

_OURS = re.compile(
    r"\.(?:\d{6,}\.tar|\d{6,}\.tar\.index|index\.json|bad_samples\.jsonl|latentae\.json)\..*\.incomplete"
)


class ImageSource(Protocol):
    """Images to pack, by number. `load` is called by several threads at once.

    Attributes:
        location: where the images are, for the record.
        sizes: bytes of each image file.
        listing: hex digest that changes with the images.
    """

    location: str
    sizes: list[int]
    listing: str

    def key(self, number: int) -> str:
        """The key of a sample: unique, and escaped as by `escape_key`."""
        ...

    def name(self, number: int) -> str:
        """The name of an image in messages."""
        ...

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes, the image first. Raises ImageError."""
        ...


def default_shard_size(count: int) -> int:
    """Maximum samples per shard: 16 to 1000, so that `count` images give eight shards or more.

    Training shuffles and distributes shards, so a small data set needs several too.
    """
    return min(max(-(-count // 8), 16), 1000)


@verb(ShardsOptions)
def shards(options: ShardsOptions) -> ShardIndex:
    """Pack images into WebDataset shards `OUT/000000.tar ...`, with their indexes and manifest.

    Files of a folder are copied unchanged, with a `.txt`, `.json`, `.cls` or `.caption` of the same
    name. A sample's key is its path in the folder without extension, with dots and spaces escaped.
    A Hugging Face dataset gives the files of its image column; a class label becomes `.cls`, other
    numbers and texts `.json`, and the key is the row's number.

    Every image is decoded once as a check. A stopped run resumes with the missing shards and ends
    with the same bytes. Other files in `out` are not touched.

    Raises:
        DataError: no such images, none at all, or two files with the same key.
        ImageError: an image can't be read (without `skip_bad`), or none can.
        MissingDependencyError: the package datasets, or the package of the built-in images, is
            missing.
        OutputError: the output can't be written, or contains other shards.
    """
    out = Path(options.out)
    if options.quality is not None and options.resize is None:
        raise RecipeError("quality is for resized images; give resize too, or omit quality to copy files")
    source = _source(options.images, out)
    count = len(source.sizes)
    shard_size = options.shard_size or default_shard_size(count)
    groups = _split(enumerate(source.sizes), shard_size, options.max_shard_mb * 1e6)
    plan = [(out / f"{number:06}.tar", range(group[0], group[-1] + 1)) for number, group in enumerate(groups)]
    inputs = {
        "images": source.location,
        "files": count,
        "listing": source.listing,
        **identity(options),
        "shard_size": shard_size,
    }  # without `skip_bad` and `max_pixels`, so that a run that stopped at a bad or large image can resume
    job = Job.open(out, "shards", inputs, foreign=_is_shards)
    if job.state == "finished":
        index = load_index([str(out / row["name"]) for row in read_json(out / INDEX_NAME)["shards"]])
        say(f"{out} is finished: these images are already in shards{_bad(count - index.samples, out)}")
        return index
    for leftover in out.glob(".*.incomplete"):  # of a killed run
        if _OURS.fullmatch(leftover.name) and abandoned(leftover):
            leftover.unlink(missing_ok=True)
    entries = _Packer(source, options).run(plan)
    if not any(entry.samples for entry in entries):
        found = f"none of the {count} images of {options.images} can be read"
        raise ImageError(f"{found}; see {out / BAD_SAMPLES}")
    for entry in entries:
        if not entry.samples:  # every image of this shard was bad
            Path(entry.path).unlink()
    index = write_index(out, [entry for entry in entries if entry.samples])
    bad = count - index.samples
    left_out = dict(sorted(source.left_out.items())) if isinstance(source, ImageFolder) else {}
    job.finish(samples=index.samples, bad_samples=bad, left_out=left_out, shards=len(index.shards))
    say(f"shards: {index.samples} images in {len(index.shards)} shards in {out}{_bad(bad, out)}")
    return index


def _bad(count: int, out: Path) -> str:
    return f"; {count} unreadable images are left out, see {out / BAD_SAMPLES}" if count else ""


def _source(images: str | Path, out: Path) -> ImageSource:
    if is_builtin(str(images)) and not Path(images).is_dir():
        return BuiltinImages(str(images))
    if not str(images).startswith("hf://") and Path(images).resolve() == out.resolve():
        raise OutputError(f"{out} is the image folder itself; choose another folder for the shards")
    return ImageDataset(str(images)) if is_dataset(images) else ImageFolder(Path(images), leave_out=out)


def write_shards(
    samples: Iterable[Members], out: str | Path, *, shard_size: int = 1000, max_shard_mb: float = 1000.0
) -> ShardIndex:
    """Write samples from memory to shards `OUT/000000.tar ...`, with their indexes and manifest.

    Args:
        samples: `{"__key__": "folder/name", "png": bytes, ...}` with unique keys, escaped as by
            `escape_key`.
        out: folder without shards.
        shard_size: maximum samples per shard.
        max_shard_mb: maximum MB per shard, unless one sample is larger.

    Raises:
        DataError: no samples, or a key that occurs twice or that readers would misread.
        OutputError: the output can't be written or already contains shards.
    """
    out = Path(out)
    if shard_size < 1 or max_shard_mb <= 0:
        raise DataError(
            f"shard_size is {shard_size} and max_shard_mb {max_shard_mb}; expected more than zero"
        )
    if any(out.glob("*.tar")):
        raise OutputError(f"{out} already contains shards; choose another output or remove them")
    written: list[Path] = []
    sized = ((sample, sum(len(value) for value in sample.values())) for sample in _checked(samples))
    for group in _split(sized, shard_size, max_shard_mb * 1e6):
        path = out / f"{len(written):06}.tar"
        with atomic_file(path) as temporary:
            fill_tar(temporary, group)
        written.append(path)
    if not written:
        raise DataError(f"no samples to write to {out}; give at least one")
    return write_index(out, [scan_shard(path) for path in written])


def _checked(samples: Iterable[Members]) -> Iterator[Members]:
    seen: set[str] = set()
    for sample in samples:
        key = sample.get("__key__")
        if not isinstance(key, str) or not key:
            raise DataError(f"a sample has the key {key!r}; expected a text such as 'folder/name'")
        plain = key.replace("%", "")
        if escape_key(plain) != plain or key.startswith("/"):
            raise DataError(f"sample key {key!r} has characters that readers misread; use escape_key")
        if key in seen:
            raise DataError(f"two samples have the key {key!r}; keys must be unique")
        seen.add(key)
        yield sample


def fill_tar(path: Path, samples: Iterable[Members]) -> None:
    """Write samples to a tar; the same samples give the same bytes."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for sample in samples:
            for extension, data in sample.items():
                if extension != "__key__" and isinstance(data, bytes):
                    add_member(tar, f"{sample['__key__']}.{extension}", data)


def _split(sized: Iterable[tuple[_T, int]], count: int, size: float) -> Iterator[list[_T]]:
    """Cut a stream into groups of at most `count` items and `size` bytes."""
    group: list[_T] = []
    total = 0
    for item, weight in sized:
        if group and (len(group) == count or total + weight > size):
            yield group
            group, total = [], 0
        group.append(item)
        total += weight
    if group:
        yield group


def _is_shards(name: str) -> bool:
    return name.endswith((".tar", ".tar" + SUFFIX)) or name in (INDEX_NAME, BAD_SAMPLES)


class _Packer:
    """Packs images into shards: some threads read, check and shrink images, others write tars."""

    def __init__(self, source: ImageSource, options: ShardsOptions) -> None:
        self.source, self.options, self.out = source, options, Path(options.out)
        self._stop, self._lock = threading.Event(), threading.Lock()

    def run(self, plan: Sequence[tuple[Path, range]]) -> list[ShardEntry]:
        """Write the missing shards of a plan, each with its index.

        Raises:
            ImageError: an image can't be read, without `skip_bad`.
            OutputError: a shard can't be written.
        """
        missing = [not path.exists() for path, _ in plan]
        total = sum(len(numbers) for _, numbers in plan)
        todo = sum(len(numbers) for (_, numbers), here in zip(plan, missing, strict=True) if here)
        workers = self.options.workers or min(os.cpu_count() or 1, 16)
        writers = max(1, min(workers, sum(missing)))
        depth = max(2, 2 * workers // writers)  # images that are loaded ahead for each shard
        with (
            Progress("packing images", total=total, initial=total - todo) as progress,
            ThreadPoolExecutor(workers) as readers,
        ):

            def write(item: tuple[Path, range]) -> ShardEntry:
                return self._write(*item, readers, depth, progress)

            return in_parallel(write, plan, writers, self._stop, lambda: None)

    def _write(
        self, path: Path, numbers: range, readers: ThreadPoolExecutor, depth: int, progress: Progress
    ) -> ShardEntry:
        if path.exists():
            table = IndexFiles((str(path),), None).find(str(path))
            indexed = table is not None and table.record["sha256"]
            return entry_of(str(path), table) if table is not None and indexed else scan_shard(path)
        bad: list[dict[str, str]] = []

        def good() -> Iterator[Members]:
            for number, result in zip(numbers, self._ahead(readers, numbers, depth), strict=True):
                if self._stop.is_set():
                    raise Interrupted("packing was stopped; run the same command again to resume")
                try:
                    yield result.result()
                except ImageError as error:
                    if not self.options.skip_bad:
                        raise
                    name, key = self.source.name(number), self.source.key(number)
                    bad.append({"file": name, "key": key, "shard": path.name, "reason": str(error)})
                with self._lock:
                    progress.advance()

        with atomic_file(path) as temporary:
            fill_tar(temporary, good())
            self._record_bad(path, bad)  # before the shard gets its name, so that every shard has its record
        return scan_shard(path)

    def _ahead(self, readers: ThreadPoolExecutor, numbers: range, depth: int) -> Iterator[Future[Members]]:
        """Load images in order, a few ahead. `readers.map` would load a complete shard."""
        running: deque[Future[Members]] = deque()
        todo = iter(numbers)
        try:
            while True:
                for number in itertools.islice(todo, depth - len(running)):
                    running.append(readers.submit(self._load, number))
                if not running:
                    return
                yield running.popleft()
        finally:
            for future in running:
                future.cancel()

    def _load(self, number: int) -> Members:
        """A sample. Its image is decoded as a check, and shrunk if requested."""
        members, options = self.source.load(number), self.options
        extension, name = image_extension(members), self.source.name(number)
        if extension is None:
            raise ImageError(f"image {name} has an unknown format: found {', '.join(members)}")
        sample: dict[str, str | bytes] = {"__key__": self.source.key(number)}
        data, limit = members[extension], options.max_pixels
        if options.resize is None:
            decode_image(data, name, max_pixels=limit, short=1)
        elif smaller := shrink(data, name, options.resize, options.quality, max_pixels=limit):
            del members[extension]
            sample[smaller[0]] = smaller[1]
        return {**sample, **members}

    def _record_bad(self, path: Path, bad: list[dict[str, str]]) -> None:
        """Replace the lines of this shard in `bad_samples.jsonl`, perhaps from a killed run."""
        record = self.out / BAD_SAMPLES
        with self._lock:
            before = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
            others = [line for line in before if json.loads(line)["shard"] != path.name]
            lines = [*others, *(json.dumps(entry, ensure_ascii=False) for entry in bad)]
            lines.sort(key=lambda line: json.loads(line)["shard"])
            if lines != before:
                write_text(record, "".join(f"{line}\n" for line in lines))
