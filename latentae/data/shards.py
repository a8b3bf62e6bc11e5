"""Make shards: from a folder of images, a Hugging Face dataset or built-in images (the verb `shards`), or from samples in memory.

A shard appears under its name only when it is whole, and the manifest `index.json` only when every shard is there. The same input
gives the same bytes: sorted order, fixed tar metadata, original image bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from latentae.data.builtin import BuiltinImages, is_builtin
from latentae.data.folder import ImageFolder, escape_key
from latentae.data.hf_dataset import ImageDataset, is_dataset
from latentae.data.options import ShardsOptions
from latentae.data.packing import ImageSource, Members, Packer, fill_tar
from latentae.data.shard_index import INDEX_NAME, SUFFIX, ShardIndex, load_index, scan_shard, write_index
from latentae.data.shrinking import encode_png
from latentae.errors import DataError, ImageError, OutputError
from latentae.file_names import BAD_SAMPLES, RECORD
from latentae.files import abandoned, atomic_file, read_json
from latentae.jobs import Job
from latentae.options import verb
from latentae.progress import say

__all__ = ["default_shard_size", "encode_png", "shards", "write_shards"]

_T = TypeVar("_T")
_OURS = re.compile(
    r"\.(?:\d{6,}\.tar|\d{6,}\.tar\.index|index\.json|bad_samples\.jsonl|latentae\.json)\..*\.incomplete"
)


def default_shard_size(count: int) -> int:
    """Samples in a shard: `count` images give eight shards or more, of 16 to 1000 images each.

    Shards are the unit that training shuffles and shares out, so a small data set needs several too.
    """
    return min(max(-(-count // 8), 16), 1000)


@verb(ShardsOptions)
def shards(options: ShardsOptions) -> ShardIndex:
    """Pack images into WebDataset shards `OUT/000000.tar ...`, each with its index, and a manifest `index.json`.

    From a folder, the files are copied as they are, with a `.txt`, `.json`, `.cls` or `.caption` of the same name if there is one. A
    sample's key is its path under the folder without extension, dots and spaces escaped. From a Hugging Face dataset, the files
    are those of its image column, a class label becomes `.cls`, other numbers and texts `.json`; the key is the row's number.

    Every image is decoded once to be sure that it can be. A run that was stopped, in whatever way, goes on with the shards that
    are missing, and ends with the same bytes. Other files in `out` are left alone.

    Raises:
        DataError: no such images, none at all, or two files with the same key.
        ImageError: an image can't be read (without `skip_bad`), or none can.
        MissingDependencyError: a dataset without the package datasets, or built-in images without the package that holds them.
        OutputError: the output can't be written, or holds shards of something else.
    """
    out = Path(options.out)
    _check(options.shard_size, options.max_shard_mb, options.resize, options.quality, options.workers)
    source = _source(options.images, out)
    count = len(source.sizes)
    shard_size = options.shard_size or default_shard_size(count)
    groups = _split(
        ((number, size) for number, size in enumerate(source.sizes)),
        shard_size,
        options.max_shard_mb * 1e6,
    )
    plan = [(out / f"{number:06}.tar", range(group[0], group[-1] + 1)) for number, group in enumerate(groups)]
    inputs = {
        "images": source.place,
        "files": count,
        "listing": source.listing,
        "shard_size": shard_size,
        "max_shard_mb": float(options.max_shard_mb),
        "resize": options.resize,
        "quality": options.quality,
    }  # without `skip_bad` and `max_pixels`, so that a run that stopped at a bad or large image can resume
    job = _ShardsJob.claim(out, inputs)
    if job.state == "finished":
        index = load_index([str(out / row["name"]) for row in read_json(out / INDEX_NAME)["shards"]])
        say(f"{out} is finished: these images are already in shards{_bad(count - index.samples, out)}")
        return index
    _remove_leftovers(out)
    threads = options.workers or min(os.cpu_count() or 1, 16)
    entries = Packer(
        source, out, options.resize, options.quality, options.skip_bad, threads, options.max_pixels
    ).run(plan)
    if not any(entry.samples for entry in entries):
        raise ImageError(
            f"none of the {count} images of {options.images} can be read; see {out / BAD_SAMPLES}"
        )
    for entry in entries:
        if not entry.samples:  # every image of this shard was bad
            Path(entry.path).unlink()
    index = write_index(out, [entry for entry in entries if entry.samples])
    bad, left_out = count - index.samples, source.left_out if isinstance(source, ImageFolder) else {}
    job.finish(
        samples=index.samples,
        bad_samples=bad,
        left_out=dict(sorted(left_out.items())),
        shards=len(index.shards),
    )
    say(f"shards: {index.samples} images in {len(index.shards)} shards in {out}{_bad(bad, out)}")
    return index


def _bad(count: int, out: Path) -> str:
    return f"; left out {count} that can't be read, see {out / BAD_SAMPLES}" if count else ""


def _source(images: str | Path, out: Path) -> ImageSource:
    if is_builtin(str(images)) and not Path(images).is_dir():
        return BuiltinImages(str(images))
    if not str(images).startswith("hf://") and Path(images).resolve() == out.resolve():
        raise OutputError(f"{out} is the image folder itself; choose another folder for the shards")
    return ImageDataset(str(images)) if is_dataset(images) else ImageFolder(Path(images), leave_out=out)


def write_shards(
    samples: Iterable[Members], out: str | Path, *, shard_size: int = 1000, max_shard_mb: float = 1000.0
) -> ShardIndex:
    """Write samples from memory to `OUT/000000.tar ...`, each with its index, and a manifest `index.json`, in the order given.

    Args:
        samples: `{"__key__": "folder/name", "png": bytes, ...}`; keys as `escape_key` makes them, each once.
        out: folder that holds no shards yet.
        shard_size: at most so many samples in a shard.
        max_shard_mb: and at most so many MB, unless one sample alone is larger.

    Raises:
        DataError: no samples, or a key that readers would misread or that occurs twice.
        OutputError: the output can't be written or already holds shards.
    """
    out = Path(out)
    _check(shard_size, max_shard_mb)
    if any(out.glob("*.tar")):
        raise OutputError(f"{out} already holds shards; choose another output or remove them")
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


def _check(
    shard_size: int | None,
    max_shard_mb: float,
    resize: int | None = None,
    quality: int | None = None,
    workers: int | None = None,
) -> None:
    values = {"shard_size": shard_size, "max_shard_mb": max_shard_mb, "resize": resize, "workers": workers}
    for name, value in values.items():
        if value is not None and not value > 0:
            raise DataError(f"{name} is {value}; it must be above zero")
    if quality is not None and not 1 <= quality <= 100:
        raise DataError(f"quality is {quality}; a JPEG's is from 1 to 100")
    if quality is not None and resize is None:
        raise DataError(
            "quality is of images that are resized; give resize too, or leave it out to copy files as they are"
        )


class _ShardsJob(Job):
    """A job in a folder that may hold other files, as long as none is a shard."""

    @classmethod
    def claim(cls, folder: Path, inputs: Mapping[str, Any]) -> Job:
        if (folder / RECORD).exists() or not folder.is_dir():
            return cls.open(folder, "shards", inputs)
        taken = next((p.name for p in sorted(folder.iterdir()) if _is_shards(p.name)), None)
        if taken:
            raise OutputError(
                f"{folder} already holds {taken}, which would mix with the shards; choose another folder"
            )
        job = cls(folder, "shards", dict(inputs), "new")
        job._write(finished=False)
        return job


def _is_shards(name: str) -> bool:
    return name.endswith((".tar", ".tar" + SUFFIX)) or name in (INDEX_NAME, BAD_SAMPLES)


def _checked(samples: Iterable[Members]) -> Iterator[Members]:
    seen: set[str] = set()
    for sample in samples:
        key = sample.get("__key__")
        if not isinstance(key, str) or not key:
            raise DataError(f"a sample has the key {key!r}; expected a text such as 'folder/name'")
        plain = key.replace("%", "")
        if escape_key(plain) != plain or key.startswith("/"):
            raise DataError(
                f"sample key {key!r} has characters that readers of shards would misread; pass it through escape_key"
            )
        if key in seen:
            raise DataError(f"two samples have the key {key!r}; keys must be unique")
        seen.add(key)
        yield sample


def _remove_leftovers(out: Path) -> None:
    """What a killed run was writing."""
    for leftover in out.glob(".*.incomplete"):
        if _OURS.fullmatch(leftover.name) and abandoned(leftover):
            leftover.unlink(missing_ok=True)


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
