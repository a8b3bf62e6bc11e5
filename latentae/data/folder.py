"""A folder of images: which files are images, and what their samples are called."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentae.data.decode import IMAGE_EXTENSIONS
from latentae.errors import DataError, ImageError

__all__ = ["ImageFolder", "SourceImage", "escape_key", "find_images"]

SIDECARS = (".txt", ".json", ".cls", ".caption")  # captions, notes and labels that travel with their image


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file, the key of its sample, its size in bytes, and the files beside it that share its stem."""

    path: Path
    key: str
    bytes: int
    sidecars: tuple[Path, ...]


class ImageFolder:
    """The images under a folder, to be packed into shards.

    Args:
        folder: searched as `find_images` does.
        leave_out: a folder to pass over.

    Raises:
        DataError: as `find_images`.
    """

    def __init__(self, folder: Path, leave_out: Path | None = None) -> None:
        self.folder = folder
        self.files = find_images(folder, leave_out)
        self.place = str(folder.resolve())
        self.sizes = [file.bytes for file in self.files]
        rows = [[file.key, file.path.suffix, file.bytes, [side.suffix for side in file.sidecars]] for file in self.files]
        self.listing = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.files[number].key

    def name(self, number: int) -> str:
        """What the record of bad samples calls an image: its path under the folder."""
        return self.files[number].path.relative_to(self.folder).as_posix()

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes of an image, which comes first, and its sidecars, as they are.

        Raises:
            ImageError: a file can't be read.
        """
        file = self.files[number]
        try:
            data = file.path.read_bytes()
            return {file.path.suffix[1:].lower(): data, **{side.suffix[1:]: side.read_bytes() for side in file.sidecars}}
        except OSError as error:
            raise ImageError(f"image {file.path} can't be read ({error.strerror or error}); check the file") from error


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
    images: dict[str, SourceImage] = {}
    for path, beside in sorted(_walk(folder, skip), key=lambda found: found[0].relative_to(folder).as_posix()):
        key = escape_key(path.relative_to(folder).with_suffix("").as_posix())
        if key in images:
            raise DataError(f"{images[key].path} and {path} would both be sample {key!r}; rename one of them")
        sidecars = (path.with_suffix(suffix) for suffix in SIDECARS)
        found = tuple(side for side in sidecars if side.name in beside and side.is_file())
        images[key] = SourceImage(path, key, path.stat().st_size, found)
    if not images:
        raise DataError(f"no image under {folder}; expected {', '.join(IMAGE_EXTENSIONS)} files")
    return list(images.values())


def _walk(root: Path, skip: Path | None) -> Iterator[tuple[Path, frozenset[str]]]:
    """Image files under `root` and the names beside them: real folders first, then the links to folders outside them."""
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
            beside = frozenset(files)
            yield from ((path, beside) for path in (Path(top, name) for name in files) if _is_image(path))
        roots += sorted(links)


def _is_image(path: Path) -> bool:
    return not path.name.startswith(".") and path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.is_file()
