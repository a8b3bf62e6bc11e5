"""A folder of images: which files are images, and what their samples are called."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentae.data.decode import IMAGE_EXTENSIONS
from latentae.errors import DataError

__all__ = ["SourceImage", "escape_key", "find_images"]

SIDECARS = (".txt", ".json")  # captions and notes that travel with their image


@dataclass(frozen=True)
class SourceImage:
    """An image file, the key of its sample, its size in bytes, and the text files beside it that share its stem."""

    path: Path
    key: str
    bytes: int
    sidecars: tuple[Path, ...]


def escape_key(relative: str) -> str:
    """The sample key of a relative path without extension, `/` between folders.

    Dots and spaces would be cut off or quoted by readers of tars, so they, `%` and what can't be printed become `%XX` of their
    UTF-8 bytes; no two paths share a key.
    """
    key = "".join(
        _escape(character) if character in ". %\\" or not character.isprintable() else character for character in relative
    )
    return _escape(key[0]) + key[1:] if key.startswith("__") else key  # webdataset leaves out members such as __name__/...


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def find_images(folder: str | Path, leave_out: Path | None = None) -> list[SourceImage]:
    """Every image under a folder, sorted by path.

    Links to folders are followed, but each real folder is read once, so a loop of links ends. Hidden files and folders and
    everything under `leave_out` are passed over, and so are files of other kinds.

    Raises:
        DataError: the folder is missing or holds no image, or two files would get the same key.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"image folder {folder} {found}; name a folder that holds {', '.join(IMAGE_EXTENSIONS)} files")
    skip = leave_out.resolve() if leave_out else None
    names: dict[str, Path] = {}
    for path in sorted(_walk(folder, skip), key=lambda path: path.relative_to(folder).as_posix()):
        key = escape_key(path.relative_to(folder).with_suffix("").as_posix())
        if key in names:
            raise DataError(f"{names[key]} and {path} would both be sample {key!r}; rename one of them")
        names[key] = path
    if not names:
        raise DataError(f"no image under {folder}; expected {', '.join(IMAGE_EXTENSIONS)} files")
    return [SourceImage(path, key, path.stat().st_size, _sidecars(path)) for key, path in names.items()]


def _walk(root: Path, skip: Path | None) -> Iterator[Path]:
    """Image files under `root`: real folders first, then the links to folders outside them."""
    seen: set[Path] = set()
    roots = [root]
    while roots:
        links: list[Path] = []
        for top, folders, files in os.walk(roots.pop(0)):
            here = Path(top).resolve()
            if here in seen or here == skip:
                folders.clear()
                continue
            seen.add(here)
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += [Path(top, name) for name in folders if Path(top, name).is_symlink()]
            yield from (path for path in (Path(top, name) for name in files) if _is_image(path))
        roots += sorted(links)


def _is_image(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()


def _sidecars(path: Path) -> tuple[Path, ...]:
    return tuple(side for side in (path.with_suffix(suffix) for suffix in SIDECARS) if side.is_file())
