"""A folder of images: which files are images, and what their samples are called."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentae.data.decode import IMAGE_EXTENSIONS
from latentae.errors import DataError, ImageError
from latentae.progress import say

__all__ = [
    "ImageFolder",
    "SourceImage",
    "by_stem",
    "escape_key",
    "find_images",
    "find_sidecars",
    "unescape_key",
]

SIDECARS = (".txt", ".json", ".cls", ".caption")  # captions, notes and labels that travel with their image
_UNREAD = re.compile(
    r"\.(gif|hei[cf]|hif|jp2|j2k|j2c|jpc|jpf|jpx|jxl|jxr|wdp|ps[db]|tga|ico|icns|qoi|dds|exr|hdr|pfm|pcx|sgi|svgz?|eps"
    r"|raw|dng|cr[23]|nef|arw|orf|rw2|raf)"
)
"""Extensions of images of other kinds, for advice."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file, the key of its sample, its size in bytes, and the files beside it that share its stem."""

    path: Path
    key: str
    bytes: int
    sidecars: tuple[Path, ...]


class ImageFolder:
    """The images under a folder, to be packed into shards. What is left out is printed, by kind and number.

    Args:
        folder: searched as `find_images` does.
        leave_out: a folder to pass over.

    Attributes:
        left_out: number of files by kind: an extension such as `.gif`, "hidden", "broken link" or "no extension".

    Raises:
        DataError: as `find_images`.
    """

    def __init__(self, folder: Path, leave_out: Path | None = None) -> None:
        self.folder = folder
        self.files, self.left_out = _find(folder, leave_out)
        self.place = str(folder.resolve())
        self.sizes = [file.bytes for file in self.files]
        rows = [
            [file.key, file.path.suffix, file.bytes, [side.suffix for side in file.sidecars]]
            for file in self.files
        ]
        self.listing = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
        if self.left_out:
            say(f"{folder}: {len(self.files)} images; left out: {_told(self.left_out)}")

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
            return {
                file.path.suffix[1:].lower(): data,
                **{side.suffix[1:].lower(): side.read_bytes() for side in file.sidecars},
            }
        except OSError as error:
            raise ImageError(
                f"image {file.path} can't be read ({error.strerror or error}); check the file"
            ) from error


def escape_key(relative: str) -> str:
    """The sample key of a relative path without extension, `/` between folders.

    Dots and spaces would be cut off or quoted by readers of tars, so they, `%` and what can't be printed become `%XX` of their
    UTF-8 bytes; no two paths share a key.
    """
    key = "".join(
        _escape(character) if character in ". %\\" or not character.isprintable() else character
        for character in relative
    )
    return (
        _escape(key[0]) + key[1:] if key.startswith("__") else key
    )  # webdataset leaves out members such as __name__/...


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def unescape_key(key: str) -> str:
    """The relative path, without extension, of a key that `escape_key` made; any other key is returned unchanged."""
    data = key.encode("utf-8", "surrogateescape")
    path = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes([int(match[1], 16)]), data).decode(
        "utf-8", "surrogateescape"
    )
    return path if escape_key(path) == key else key


def find_images(folder: str | Path, leave_out: Path | None = None) -> list[SourceImage]:
    """Every image under a folder, sorted by path.

    Links to folders are followed, but each real folder is read once, so a loop of links ends. Hidden files and folders and
    everything under `leave_out` are passed over, and so are files of other kinds.

    Raises:
        DataError: the folder is missing, can't be read or holds no image, or two files would get the same key.
    """
    return _find(Path(folder), leave_out)[0]


def find_sidecars(image: Path, names: Mapping[tuple[str, str], list[str]]) -> tuple[Path, ...]:
    """The captions, notes and labels of an image, in the order of SIDECARS.

    Args:
        image: its file.
        names: of the files in its folder, from `by_stem`.

    Raises:
        DataError: two files differ by the case of their extension only.
    """
    found = [names.get((image.stem, suffix), []) for suffix in SIDECARS]
    twice = next((same for same in found if len(same) > 1), None)
    if twice:
        raise DataError(
            f"{' and '.join(twice)} in {image.parent} would both belong to {image.name}; remove one of them"
        )
    return tuple(path for same in found for name in same if (path := image.with_name(name)).is_file())


def by_stem(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """File names by their stem and their extension in lower case."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 (a name, of which there are millions)
        found[stem, suffix.lower()].append(name)
    return dict(found)


def _find(folder: Path, leave_out: Path | None) -> tuple[list[SourceImage], Counter[str]]:
    """The images, and how many files of each kind are none."""
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"image folder {folder} {found}; name a folder that holds {', '.join(IMAGE_EXTENSIONS)} files"
        )
    images: dict[str, SourceImage] = {}
    left_out: Counter[str] = Counter()
    paths: list[tuple[Path, Mapping[tuple[str, str], list[str]]]] = []
    for top, hidden, files in _walk(folder, leave_out.resolve() if leave_out else None):
        left_out["hidden"] += hidden
        names = by_stem(files)
        for name in files:
            path = top / name
            left_out[kind := _kind(path)] += 1
            if kind == "":
                paths.append((path, names))
    for path, names in sorted(paths, key=lambda found: found[0].relative_to(folder).as_posix()):
        key = escape_key(path.relative_to(folder).with_suffix("").as_posix())
        if key in images:
            raise DataError(f"{images[key].path} and {path} would both be sample {key!r}; rename one of them")
        sidecars = find_sidecars(path, names)
        left_out.subtract(side.suffix.lower() for side in sidecars)
        images[key] = SourceImage(path, key, path.stat().st_size, sidecars)
    del left_out[""]
    if not images:
        there = f"found {_told(+left_out)}" if +left_out else "it is empty"
        raise DataError(f"no image under {folder}: {there}; expected {', '.join(IMAGE_EXTENSIONS)} files")
    return list(images.values()), +left_out


def _walk(root: Path, skip: Path | None) -> Iterator[tuple[Path, int, list[str]]]:
    """Folders, how many hidden entries each has, and its other files: real folders first, then the links to folders outside them."""
    seen: set[Path] = set()
    roots = [root]
    while roots:
        links: list[Path] = []
        for top, folders, files in os.walk(roots.pop(0), onerror=_refuse):
            here = Path(top).resolve()
            if here in seen or here == skip:
                folders.clear()
                continue
            seen.add(here)
            hidden = sum(name.startswith(".") for name in (*folders, *files))
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += [Path(top, name) for name in folders if Path(top, name).is_symlink()]
            yield Path(top), hidden, [name for name in files if not name.startswith(".")]
        roots += sorted(links)


def _refuse(error: OSError) -> None:
    raise DataError(
        f"folder {error.filename} can't be read ({error.strerror}); change its permissions or move it away"
    )


def _kind(path: Path) -> str:
    """Why a file is no image, in a word or as its extension; empty for an image."""
    if not path.is_file():
        return "broken link" if path.is_symlink() else "special file"
    return "" if path.suffix[1:].lower() in IMAGE_EXTENSIONS else path.suffix.lower() or "no extension"


def _told(left_out: Mapping[str, int]) -> str:
    """Kinds and numbers in words, images first, each group by number."""
    images = {kind: count for kind, count in left_out.items() if _UNREAD.fullmatch(kind)}
    others = {kind: count for kind, count in left_out.items() if kind not in images}
    groups = [
        ", ".join(f"{n} {kind}" for kind, n in sorted(group.items(), key=lambda pair: (-pair[1], pair[0])))
        for group in (images, others)
    ]
    advice = " (convert them to PNG or JPEG)" if images else ""
    return "; ".join(text for text in (groups[0] + advice, groups[1]) if text)
