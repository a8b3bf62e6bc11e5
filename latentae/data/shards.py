"""Shards on disk: which files a specification names, and the samples inside one.

webdataset reads and groups the members. It is fed open files only, never a URL (so no `pipe:` runs), and none of its decoders
(so nothing is unpickled). Before it reads, the headers are walked: Python's tarfile silently stops at a damaged header, and a
shard must be whole or an error, never half.
"""

from __future__ import annotations

import glob
import re
import tarfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from latentae.errors import ShardError

__all__ = ["RawSample", "expand_shards", "read_shard", "shard_keys"]

RawSample = dict[str, Any]  # member extension (lower case, no dot) -> bytes; "__key__" and "__url__" (the shard) -> str

_SCHEME = re.compile(r"^([a-zA-Z][a-zA-Z0-9+.-]+://|pipe:)")
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset leaves out
_HINT = "pass a folder of .tar files, a file, a glob or a brace pattern such as {000..099}.tar"


def expand_shards(spec: str | Path | Sequence[str | Path]) -> list[str]:
    """The shard files that a specification names, in order.

    Args:
        spec: a local folder (its `*.tar`, sorted), a file, a glob, a brace pattern, several joined by `::`, or a sequence.

    Raises:
        ShardError: nothing matches, a named file is missing or named twice, or the path is remote.
    """
    if isinstance(spec, str):
        parts: list[str] = [part for part in spec.split("::") if part]
    else:
        parts = [str(spec)] if isinstance(spec, Path) else [path for part in spec for path in expand_shards(part)]
    paths = [path for part in parts for path in _expand_one(part)]
    if not paths:
        raise ShardError(f"no shards in {spec!r}; {_HINT}")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ShardError(f"shard {twice} is named twice; name each shard once")
    return paths


def _expand_one(spec: str) -> list[str]:
    if _SCHEME.match(spec):
        raise ShardError(f"shards must be local files, found {spec!r}; copy them to a folder first")
    if Path(spec).is_dir():
        paths = sorted(str(path) for path in Path(spec).glob("*.tar") if path.is_file())
        if not paths:
            raise ShardError(f"folder {spec} holds no .tar shard; make shards from images with `latentae shards IMAGES OUT`")
        return paths
    if Path(spec).is_file():
        return [spec]
    import braceexpand

    try:
        candidates = list(braceexpand.braceexpand(spec, escape=False))
    except ValueError:
        raise ShardError(f"unbalanced braces in {spec!r}; {_HINT}") from None
    return [path for candidate in candidates for path in _match(candidate, spec)]


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


def shard_keys(path: str | Path) -> list[str]:
    """The keys of a shard's samples in tar order, from its headers; checks that the tar is whole.

    Raises:
        ShardError: missing, not a plain tar, cut short, damaged, or with a key that occurs twice.
    """
    from webdataset.tariterators import group_by_keys

    members = ({"fname": info.name, "data": b"", "__url__": str(path)} for info in _headers(path))
    try:
        keys = [sample["__key__"] for sample in group_by_keys(members)]
    except ValueError as error:
        raise ShardError(f"shard {path} holds a member twice ({_first_line(error)}); write it again") from None
    if len(set(keys)) < len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise ShardError(f"shard {path} holds sample {twice!r} twice, and not side by side; write it again with unique keys")
    return keys


def _headers(path: str | Path) -> Iterator[tarfile.TarInfo]:
    """Walk the headers of a whole tar; its end-of-archive block must be where the last member ends."""
    try:
        if Path(path).stat().st_size == 0:
            raise ShardError(f"shard {path} is an empty file; write it again")
        with tarfile.open(path, "r:") as tar:
            position = 0
            for info in tar:
                if info.size < 0 or tar.offset <= position:  # a damaged size field could walk in circles
                    raise ShardError(f"shard {path} is damaged at byte {position}; fetch or write it again")
                position = tar.offset
                if info.name.startswith("/") or ".." in info.name.split("/"):
                    raise ShardError(
                        f"shard {path} has a member {info.name!r} that points outside; write it again with plain keys"
                    )
                if info.isreg() and not _META.match(info.name) and not re.fullmatch(r"__[^/]*__", info.name):
                    yield info
            end = tar.offset
        with Path(path).open("rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise ShardError(f"shard {path} is cut short or damaged at byte {end}; fetch or write it again")
    except FileNotFoundError:
        raise ShardError(f"no shard {path}; {_HINT}") from None
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise ShardError(
            f"shard {path} is not a whole, uncompressed tar ({_first_line(error)}); fetch or write it again"
        ) from error


def read_shard(path: str | Path, keys: Collection[str] | None = None) -> Iterator[RawSample]:
    """Yield the samples of a shard in tar order: `{"__key__": str, "__url__": shard, extension: bytes, ...}`.

    Args:
        path: a local, uncompressed tar in the WebDataset convention (members of one sample side by side).
        keys: yield only these, each of which must be there; None is all.

    Raises:
        ShardError: as `shard_keys`; raised before the first sample, so that no half sample gets out.
    """
    there = shard_keys(path)
    wanted = set(there if keys is None else keys)
    if not wanted.issubset(there):
        raise ShardError(
            f"shard {path} has changed: sample {min(wanted.difference(there))!r} is gone; start again with the shards as they are"
        )
    return _stream(path, wanted)


def _stream(path: str | Path, wanted: set[str]) -> Iterator[RawSample]:
    from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

    left = len(wanted)
    with Path(path).open("rb") as file:
        source = [{"url": str(path), "stream": file}]
        try:
            for sample in group_by_keys(tar_file_expander(source, select_files=lambda name: base_plus_ext(name)[0] in wanted)):
                left -= 1
                yield sample
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise ShardError(f"shard {path} could not be read ({_first_line(error)}); fetch or write it again") from error
    if left:
        raise ShardError(f"shard {path} ended {left} samples early; it changed or is damaged, fetch or write it again")


def _first_line(error: BaseException) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return text.splitlines()[0] if text else type(error).__name__
