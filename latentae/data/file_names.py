"""Files that are named after samples: checked before any work, so that none replaces another and every name can be written."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from latentae.errors import OutputError

__all__ = ["check_file_names"]


def check_file_names(folder: str | Path, names: Iterable[tuple[str, str]]) -> None:
    """Refuse file names before the work whose files would be lost after it.

    Args:
        folder: where the files will be written; it need not exist yet.
        names: each file's path in `folder`, with `/` between folders, and its sample, as messages call it.

    Raises:
        OutputError: two samples have one name, or a name is too long for the file system or points outside the folder.
    """
    folder = Path(folder).absolute()
    longest, longest_path = _limits(folder)
    seen: dict[str, str] = {}
    for name, sample in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise OutputError(f"{sample} can't be written as the file {name!r}; rename the sample")
        part = max(parts, key=lambda part: len(os.fsencode(part)))
        if (length := len(os.fsencode(part))) > longest:
            raise OutputError(
                f"{sample} needs a file name of {length} bytes, {folder} takes {longest}; shorten its name: {part!r}"
            )
        if (length := len(os.fsencode(folder / name))) > longest_path:
            raise OutputError(
                f"{sample} needs a path of {length} bytes, {folder} takes {longest_path}; choose a shorter folder"
            )
        if name in seen:
            raise OutputError(
                f"{seen[name]} and {sample} would both be written to {name!r}; give them different keys, or write each of the two "
                "shards to a folder of its own"
            )
        seen[name] = sample


def _limits(folder: Path) -> tuple[int, int]:
    """Bytes of a file name and of a path at most: what the file system says, else what nearly all take."""
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    with suppress(OSError, ValueError, AttributeError):  # Windows has no pathconf
        return os.pathconf(there, "PC_NAME_MAX"), os.pathconf(there, "PC_PATH_MAX") - 1
    return 255, 4095
