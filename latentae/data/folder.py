"""Folders of images: find images, name their samples, and check file names of samples."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from latentae.data.headers import IMAGE_EXTENSIONS
from latentae.errors import DataError, ImageError, OutputError
from latentae.progress import say

__all__ = [
    "ImageFolder",
    "SourceImage",
    "by_stem",
    "check_file_names",
    "escape_key",
    "find_images",
    "find_sidecars",
    "unescape_key",
]

SIDECARS = (".txt", ".json", ".cls", ".caption")  # captions, notes and labels that belong to an image
_UNREAD = re.compile(
    r"\.(gif|hei[cf]|hif|jp2|j2k|j2c|jpc|jpf|jpx|jxl|jxr|wdp|ps[db]|tga|ico|icns|qoi|dds|exr|hdr|pfm|pcx|sgi|svgz?|eps"
    r"|raw|dng|cr[23]|nef|arw|orf|rw2|raf)"
)
"""Extensions of image formats that are not read, for advice."""


@dataclass(frozen=True, slots=True)
class SourceImage:
    """An image file, the key of its sample, its size in bytes, and its sidecars."""

    path: Path
    key: str
    bytes: int
    sidecars: tuple[Path, ...]


class ImageFolder:
    """The images under a folder, to pack into shards.

    What is left out is logged by type and number.

    Args:
        folder: searched as by `find_images`.
        leave_out: a folder to skip.

    Attributes:
        left_out: number of files by type: an extension such as `.gif`, "hidden", "broken link" or
            "no extension".

    Raises:
        DataError: as `find_images`.
    """

    def __init__(self, folder: Path, leave_out: Path | None = None) -> None:
        self.folder = folder
        self.files, self.left_out = _find(folder, leave_out)
        self.location = str(folder.resolve())
        self.sizes = [file.bytes for file in self.files]
        rows = [[f.key, f.path.suffix, f.bytes, [side.suffix for side in f.sidecars]] for f in self.files]
        self.listing = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()
        if self.left_out:
            say(f"{folder}: {len(self.files)} images; left out: {_listed(self.left_out)}")

    def key(self, number: int) -> str:
        """The key of a sample."""
        return self.files[number].key

    def name(self, number: int) -> str:
        """The name of an image in the record of bad samples: its path under the folder."""
        return self.files[number].path.relative_to(self.folder).as_posix()

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes of an image, which comes first, and its sidecars, unchanged.

        Raises:
            ImageError: a file can't be read.
        """
        file = self.files[number]
        try:
            return {path.suffix[1:].lower(): path.read_bytes() for path in (file.path, *file.sidecars)}
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"image {file.path} can't be read ({reason}); check the file") from error


def escape_key(relative: str) -> str:
    """The sample key of a relative path without extension, `/` between folders.

    Readers of tars would cut or quote dots and spaces. These, `%` and unprintable characters become
    `%XX` of their UTF-8 bytes. No two paths share a key.
    """
    key = "".join(_escape(c) if c in ". %\\" or not c.isprintable() else c for c in relative)
    return _escape(key[0]) + key[1:] if key.startswith("__") else key  # webdataset skips __name__/...


def _escape(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))


def unescape_key(key: str) -> str:
    """The relative path, without extension, of a key from `escape_key`.

    Any other key is returned unchanged.
    """
    data = key.encode("utf-8", "surrogateescape")
    data = re.sub(rb"%([0-9A-F]{2})", lambda match: bytes.fromhex(match[1].decode()), data)
    path = data.decode("utf-8", "surrogateescape")
    return path if escape_key(path) == key else key


def check_file_names(folder: str | Path, names: Iterable[tuple[str, str]]) -> None:
    """Refuse, before the work, file names that can't be written or would overwrite each other.

    Args:
        folder: output folder; it need not exist yet.
        names: each file's path in `folder`, with `/` between folders, and the name of its sample in
            messages.

    Raises:
        OutputError: two samples have one name, or a name is too long for the file system or points
            outside the folder.
    """
    folder = Path(folder).absolute()
    longest, longest_path = 255, 4095  # in bytes; the limits of nearly all file systems
    existing = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    with suppress(OSError, ValueError, AttributeError):  # Windows has no pathconf
        longest, longest_path = os.pathconf(existing, "PC_NAME_MAX"), os.pathconf(existing, "PC_PATH_MAX") - 1
    seen: dict[str, str] = {}
    for name, sample in names:
        parts = name.split("/")
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise OutputError(f"{sample} can't be written as the file {name!r}; rename the sample")
        part = max(parts, key=lambda part: len(os.fsencode(part)))
        if (length := len(os.fsencode(part))) > longest:
            found = f"{sample} needs a file name of {length} bytes, {folder} takes {longest}"
            raise OutputError(f"{found}; shorten its name: {part!r}")
        if (length := len(os.fsencode(folder / name))) > longest_path:
            found = f"{sample} needs a path of {length} bytes, {folder} takes {longest_path}"
            raise OutputError(f"{found}; choose a shorter folder")
        if name in seen:
            advice = "give them different keys, or write their shards to separate folders"
            raise OutputError(f"{seen[name]} and {sample} would both be written to {name!r}; {advice}")
        seen[name] = sample


def find_images(folder: str | Path, leave_out: Path | None = None) -> list[SourceImage]:
    """Every image under a folder, sorted by path.

    Links to folders are followed. Each real folder is read once, so a loop of links ends. Hidden
    files and folders, everything under `leave_out` and files of other types are skipped.

    Raises:
        DataError: the folder is missing, can't be read or has no image, or two files would get the
            same key.
    """
    return _find(Path(folder), leave_out)[0]


def find_sidecars(image: Path, names: Mapping[tuple[str, str], list[str]]) -> tuple[Path, ...]:
    """The captions, notes and labels of an image, in the order of SIDECARS.

    Args:
        image: its file.
        names: of the files in its folder, from `by_stem`.

    Raises:
        DataError: two files differ only by the case of their extension.
    """
    found = [names.get((image.stem, suffix), []) for suffix in SIDECARS]
    twice = next((same for same in found if len(same) > 1), None)
    if twice:
        found = " and ".join(twice)
        raise DataError(f"{found} in {image.parent} would both belong to {image.name}; remove one of them")
    return tuple(path for same in found for name in same if (path := image.with_name(name)).is_file())


def by_stem(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """File names by their stem and their extension in lower case."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 (faster, for millions of names)
        found[stem, suffix.lower()].append(name)
    return dict(found)


def _find(folder: Path, leave_out: Path | None) -> tuple[list[SourceImage], Counter[str]]:
    """The images, and the number of other files by type."""
    expected = f"{', '.join(IMAGE_EXTENSIONS)} files"
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"image folder {folder} {found}; name a folder of {expected}")
    images: dict[str, SourceImage] = {}
    left_out: Counter[str] = Counter()
    paths: list[tuple[Path, Mapping[tuple[str, str], list[str]]]] = []
    for top, hidden, files in _walk(folder, leave_out.resolve() if leave_out else None):
        left_out["hidden"] += hidden
        names = by_stem(files)
        for path in (top / name for name in files):
            left_out[reason := _reason(path)] += 1
            if reason == "":
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
        found = f"found {_listed(+left_out)}" if +left_out else "it is empty"
        raise DataError(f"no image under {folder}: {found}; expected {expected}")
    return list(images.values()), +left_out


def _walk(root: Path, skip: Path | None) -> Iterator[tuple[Path, int, list[str]]]:
    """Folders, their numbers of hidden entries, and their other files. Links come last."""
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
    raise DataError(f"folder {error.filename} can't be read ({error.strerror}); change its permissions")


def _reason(path: Path) -> str:
    """Why a file is no image: a word or its extension; empty for an image."""
    if not path.is_file():
        return "broken link" if path.is_symlink() else "special file"
    return "" if path.suffix[1:].lower() in IMAGE_EXTENSIONS else path.suffix.lower() or "no extension"


def _listed(left_out: Mapping[str, int]) -> str:
    """Types and numbers, image formats first, each group by number."""
    groups = {True: "", False: ""}
    for reason, count in sorted(left_out.items(), key=lambda pair: (-pair[1], pair[0])):
        image = bool(_UNREAD.fullmatch(reason))
        groups[image] += f"{', ' * bool(groups[image])}{count} {reason}"
    advice = " (convert them to PNG or JPEG)" if groups[True] else ""
    return "; ".join(filter(None, (groups[True] + advice, groups[False])))
