"""Shards by name: which files or URLs a specification names, and the samples inside one, in order.

A shard must be whole or an error, never half: its headers are walked to the end before the first sample gets out. Nothing is
decoded here, so nothing is unpickled, and no URL runs a program.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from latentae.data.reading import RawSample, read_checked
from latentae.data.sources import is_remote, read_range, shown, size_of, stream
from latentae.data.tars import Problem, Reader, Sample, group, walk
from latentae.errors import ShardError

__all__ = ["RawSample", "expand_shards", "read_shard", "shard_keys"]

_HINT = "pass a folder of .tar files, a file, a glob or a brace pattern such as {000..099}.tar"


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """The shards that a specification names, in order.

    Args:
        spec: a folder (its `*.tar`, sorted), a file, a glob, a brace pattern, several joined by `::`, or a sequence. URLs of any
            scheme that fsspec knows work the same way, where the server can list its files; those that a brace pattern names are
            taken as they are, without asking the server.

    Raises:
        ShardError: nothing matches, a named file is missing or named twice, or the path is a `pipe:`.
    """
    if isinstance(spec, str):
        parts: list[str] = [part for part in spec.split("::") if part]
    else:
        parts = (
            [str(spec)] if isinstance(spec, Path) else [path for part in spec for path in expand_shards(part)]
        )
    paths = [path for part in parts for path in _expand_one(part)]
    if not paths:
        raise ShardError(f"no shards in {spec!r}; {_HINT}")
    if len(set(paths)) < len(paths):
        seen: set[str] = set()
        twice = next(path for path in paths if path in seen or seen.add(path))
        raise ShardError(f"shard {shown(twice)} is named twice; name each shard once")
    return paths


def _expand_one(spec: str) -> list[str]:
    spec = spec.removeprefix("file://")
    if is_remote(spec):
        return [path for candidate in _braces(spec) for path in _match_remote(candidate)]
    if Path(spec).is_dir():
        paths = sorted(str(path) for path in Path(spec).glob("*.tar") if path.is_file())
        if not paths:
            raise ShardError(
                f"folder {spec} holds no .tar shard; make shards from images with `latentae shards IMAGES OUT`"
            )
        return paths
    if Path(spec).is_file():
        return [spec]
    return [path for candidate in _braces(spec) for path in _match(candidate, spec)]


def _braces(spec: str) -> list[str]:
    import braceexpand

    try:
        return list(braceexpand.braceexpand(spec, escape=False))
    except ValueError:
        raise ShardError(f"unbalanced braces in {shown(spec)!r}; {_HINT}") from None


def _match(candidate: str, spec: str) -> list[str]:
    if Path(candidate).is_file():
        return [candidate]
    if Path(candidate).is_dir() and candidate != spec:
        return _expand_one(candidate)
    if glob.has_magic(candidate):
        paths = sorted(path for path in glob.glob(candidate) if Path(path).is_file())  # noqa: PTH207 (absolute patterns too)
        if not paths:
            raise ShardError(f"no shard matched {candidate!r}; {_HINT}")
        return paths
    source = f" (from {spec!r})" if candidate != spec else ""
    raise ShardError(f"no shard {candidate}{source}; {_HINT}")


def _match_remote(candidate: str) -> list[str]:
    from latentae.data import remote

    address = re.split(r"[?#]", candidate, maxsplit=1)[0] if candidate.startswith("http") else candidate
    if re.search(r"[*\[]", address):
        paths = remote.find(candidate)
    elif address.endswith(".tar"):  # whether it is there shows when its size is asked for
        return [candidate]
    else:
        paths = remote.find(candidate.rstrip("/") + "/*.tar")
    if not paths:
        raise ShardError(
            f"no shard matched {shown(candidate)}; {_HINT}, and make sure that the server lists its files"
        )
    return paths


def shard_keys(path: str | Path) -> list[str]:
    """The keys of a shard's samples in tar order, from its headers; checks that the tar is whole.

    Raises:
        ShardError: missing, not a plain tar, cut short, damaged, or with a key that occurs twice.
    """
    with _local(str(path)) as file:
        return [sample.key for sample in _samples(str(path), file)]


@contextmanager
def _local(path: str) -> Iterator[str]:
    """A local file with the bytes of a shard: itself, or a temporary copy of a remote one."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="latentae-") as folder:
        copy = Path(folder) / "shard.tar"
        with stream(path) as source, copy.open("wb") as target:
            while data := source.read(1 << 22):
                target.write(data)
        yield str(copy)


def _samples(path: str, file: str) -> list[Sample]:
    """Walk the headers of a whole tar at `file`, called `path` in messages."""
    reader = Reader(lambda start, stop: read_range(file, start, stop), size_of(file), chunk=1 << 13)
    return list(group(walk(reader, shown(path)), lambda problem: _refuse(path, problem)))


def _refuse(path: str, problem: Problem) -> None:
    if problem.code == "twice":
        raise ShardError(
            f"shard {shown(path)} holds {problem.name!r} twice ({problem.reason}); write it again with unique keys"
        )
    if problem.code == "outside":
        raise ShardError(
            f"shard {shown(path)} has a member {problem.name!r} that points outside; write it again with plain keys"
        )


def read_shard(path: str | Path, keys: Collection[str] | None = None) -> Iterator[RawSample]:
    """Yield the samples of a shard in tar order: `{"__key__": str, "__url__": shard, extension: bytes, ...}`.

    Args:
        path: an uncompressed tar in the WebDataset convention (members of one sample side by side), local, or remote and then
            copied to a temporary file first.
        keys: yield only these, each of which must be there; None is all.

    Raises:
        ShardError: as `shard_keys`; for a local shard raised before the first sample, so that no half sample gets out.
    """
    path = str(path)
    if is_remote(path):
        return _read_remote(path, keys)
    return _read_samples(path, path, _wanted(path, path, keys))


def _read_remote(path: str, keys: Collection[str] | None) -> Iterator[RawSample]:
    with _local(path) as file:
        yield from _read_samples(path, file, _wanted(path, file, keys))


def _wanted(path: str, file: str, keys: Collection[str] | None) -> list[Sample]:
    samples = _samples(path, file)
    if keys is None:
        return samples
    wanted = set(keys)
    gone = wanted.difference(sample.key for sample in samples)
    if gone:
        raise ShardError(
            f"shard {shown(path)} has changed: sample {min(gone)!r} is gone; start again with the shards as they are"
        )
    return [sample for sample in samples if sample.key in wanted]


def _read_samples(path: str, file: str, samples: list[Sample]) -> Iterator[RawSample]:
    for sample in samples:
        reader = Reader(lambda start, stop: read_range(file, start, stop), sample.end, start=sample.start)
        yield read_checked(path, sample.key, sample.members, reader, None)
