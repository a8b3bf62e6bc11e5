"""Make shards: from a folder of images (the verb `shards`), or from samples in memory.

A shard appears under its name only when it is whole, the index only when every shard is there. The same input gives the same
bytes: sorted order, fixed tar metadata, original image bytes.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from latentae.data.decode import decode_image
from latentae.data.folder import SourceImage, escape_key, find_images
from latentae.data.index import INDEX_NAME, ShardIndex, load_index, scan_shard, write_index
from latentae.errors import DataError, ImageError, OutputError
from latentae.files import atomic_file, read_json, write_text
from latentae.jobs import Job
from latentae.progress import Progress, say

__all__ = ["BAD_SAMPLES", "encode_png", "shards", "write_shards"]

BAD_SAMPLES = "bad_samples.jsonl"

_T = TypeVar("_T")
_Members = Mapping[str, str | bytes]  # "__key__" -> str, extension -> bytes


def shards(
    images: str | Path,
    out: str | Path,
    *,
    samples_per_shard: int = 1000,
    max_shard_mb: float = 1000.0,
    skip_bad: bool = False,
    workers: int | None = None,
) -> ShardIndex:
    """Pack a folder of images into WebDataset shards `OUT/000000.tar ...` with an `index.json`.

    The files are copied as they are, with a `.txt` or `.json` of the same name if there is one. A sample's key is its path
    under the folder without extension, dots and spaces escaped. Every image is decoded once to be sure that it can be. A run
    that was stopped goes on with the shards that are missing.

    Args:
        images: folder of images, searched with its subfolders; hidden files and `out` are passed over.
        out: folder for the shards.
        samples_per_shard: at most so many images in a shard.
        max_shard_mb: and at most so many MB of files, unless one image alone is larger.
        skip_bad: leave unreadable images out and list them in `bad_samples.jsonl`, rather than stop at the first.
        workers: threads that check images; None is one for each core, up to 8.

    Raises:
        DataError: no such folder, no image in it, or two files with the same key.
        ImageError: an image can't be read (without `skip_bad`), or none can.
        OutputError: the output can't be written or holds something else.
    """
    if samples_per_shard < 1 or max_shard_mb <= 0:
        raise DataError(f"samples_per_shard {samples_per_shard} and max_shard_mb {max_shard_mb} must be above zero")
    images, out = Path(images), Path(out)
    if images.resolve() == out.resolve():
        raise OutputError(f"{out} is the image folder itself; choose another folder for the shards")
    files = find_images(images, leave_out=out)
    job = Job.open(out, "shards", _inputs(images, files, samples_per_shard, max_shard_mb))
    plan = list(_split(((file, file.bytes) for file in files), samples_per_shard, max_shard_mb * 1e6))
    paths = [out / f"{number:06}.tar" for number in range(len(plan))]
    if job.state == "finished":
        say(f"{out} is finished: these images are already in shards")
        return load_index([str(out / row["name"]) for row in read_json(out / INDEX_NAME)["shards"]])
    _remove_leftovers(out)
    threads = workers or min(os.cpu_count() or 1, 8)
    todo = [(path, group) for path, group in zip(paths, plan, strict=True) if not path.exists()]
    done = len(files) - sum(len(group) for _, group in todo)
    with Progress("packing images", total=len(files), initial=done) as progress, ThreadPoolExecutor(threads) as pool:
        for path, group in todo:
            _write_group(path, group, images, pool, threads, skip_bad)
            progress.advance(len(group))
    entries = [scan_shard(path) for path in paths]
    if not any(entry.samples for entry in entries):
        raise ImageError(f"none of the {len(files)} images under {images} can be read; see {out / BAD_SAMPLES}")
    for entry in entries:
        if not entry.samples:  # every image of this shard was bad
            Path(entry.path).unlink()
    index = write_index(out, [entry for entry in entries if entry.samples])
    job.finish(samples=index.samples, bad_samples=len(files) - index.samples, shards=len(index.shards))
    return index


def write_shards(
    samples: Iterable[_Members], out: str | Path, *, samples_per_shard: int = 1000, max_shard_mb: float = 1000.0
) -> ShardIndex:
    """Write samples from memory to `OUT/000000.tar ...` with an `index.json`, in the order given.

    Args:
        samples: `{"__key__": "folder/name", "png": bytes, ...}`; keys as `escape_key` makes them, each once.
        out: folder that holds no shards yet.
        samples_per_shard: at most so many samples in a shard.
        max_shard_mb: and at most so many MB, unless one sample alone is larger.

    Raises:
        DataError: no samples, or a key that readers would misread or that occurs twice.
        OutputError: the output can't be written or already holds shards.
    """
    out = Path(out)
    if any(out.glob("*.tar")):
        raise OutputError(f"{out} already holds shards; choose another output or remove them")
    written: list[Path] = []
    sized = ((sample, sum(len(value) for value in sample.values())) for sample in _checked(samples))
    for group in _split(sized, samples_per_shard, max_shard_mb * 1e6):
        path = out / f"{len(written):06}.tar"
        with atomic_file(path) as temporary:
            _fill_tar(temporary, group)
        written.append(path)
    if not written:
        raise DataError(f"no samples to write to {out}; give at least one")
    return write_index(out, [scan_shard(path) for path in written])


def _fill_tar(path: Path, samples: Iterable[_Members]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for sample in samples:
            for extension, data in sample.items():
                if extension != "__key__" and isinstance(data, bytes):
                    info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")  # mtime, uid and gid 0, mode 0o644, no names
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def _checked(samples: Iterable[_Members]) -> Iterator[_Members]:
    seen: set[str] = set()
    for sample in samples:
        key = sample.get("__key__")
        if not isinstance(key, str) or not key:
            raise DataError(f"a sample has the key {key!r}; expected a text such as 'folder/name'")
        plain = key.replace("%", "")
        if escape_key(plain) != plain or key.startswith("/"):
            raise DataError(f"sample key {key!r} has characters that readers of shards would misread; pass it through escape_key")
        if key in seen:
            raise DataError(f"two samples have the key {key!r}; keys must be unique")
        seen.add(key)
        yield sample


def encode_png(image: Tensor) -> bytes:
    """uint8 [3, H, W] -> the bytes of a PNG file, lossless."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
    return file.getvalue()


def _inputs(images: Path, files: list[SourceImage], samples_per_shard: int, max_shard_mb: float) -> dict[str, object]:
    """What makes two jobs the same; not `skip_bad`, so that a run that stopped at a bad image can go on without it."""
    listing = [[file.key, file.path.suffix, file.bytes, [side.suffix for side in file.sidecars]] for file in files]
    return {
        "images": str(images.resolve()),
        "files": len(files),
        "listing": hashlib.blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest(),
        "samples_per_shard": samples_per_shard,
        "max_shard_mb": float(max_shard_mb),
    }


def _remove_leftovers(out: Path) -> None:
    """What a killed run was writing."""
    for leftover in out.glob(".*.incomplete"):
        leftover.unlink()


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


def _write_group(
    path: Path, group: list[SourceImage], root: Path, pool: ThreadPoolExecutor, threads: int, skip_bad: bool
) -> None:
    """One shard of a folder's images; what is bad goes on record before the shard takes its name."""
    bad: list[dict[str, str]] = []

    def good() -> Iterator[_Members]:
        for file, result in zip(group, _ahead(pool, group, 2 * threads), strict=True):
            try:
                yield result.result()
            except ImageError as error:
                if not skip_bad:
                    raise
                name = file.path.relative_to(root).as_posix()
                bad.append({"file": name, "key": file.key, "shard": path.name, "reason": str(error)})

    with atomic_file(path) as temporary:
        _fill_tar(temporary, good())
        _record_bad(path, bad)


def _ahead(pool: ThreadPoolExecutor, group: list[SourceImage], depth: int) -> Iterator[Future[_Members]]:
    """Load files in order, a few ahead: `pool.map` would hold the whole shard in memory."""
    running: deque[Future[_Members]] = deque()
    todo = iter(group)
    try:
        while True:
            running.extend(pool.submit(_load, file) for file in itertools.islice(todo, depth - len(running)))
            if not running:
                return
            yield running.popleft()
    finally:
        for future in running:
            future.cancel()


def _load(file: SourceImage) -> _Members:
    try:
        data = file.path.read_bytes()
        sidecars = {side.suffix[1:]: side.read_bytes() for side in file.sidecars}
    except OSError as error:
        raise ImageError(f"image {file.path} can't be read ({error.strerror or error}); check the file") from error
    decode_image(data, str(file.path))
    return {"__key__": file.key, file.path.suffix[1:].lower(): data, **sidecars}


def _record_bad(path: Path, bad: list[dict[str, str]]) -> None:
    """Replace what `bad_samples.jsonl` says of this shard: it may have been written before a run was killed."""
    record = path.parent / BAD_SAMPLES
    lines = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
    kept = [line for line in lines if json.loads(line)["shard"] != path.name]
    if bad or len(kept) < len(lines):
        write_text(record, "".join(f"{line}\n" for line in [*kept, *(json.dumps(entry, ensure_ascii=False) for entry in bad)]))
