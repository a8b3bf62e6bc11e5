"""Images that a task reads from a folder, files or shards, by number, with keys and labels."""

from __future__ import annotations

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from latentae.data.decode import IMAGE_EXTENSIONS, MAX_PIXELS, decode_image, image_extension
from latentae.data.folder import ImageFolder, SourceImage, by_stem, escape_key, find_sidecars
from latentae.data.shard_files import READ_EXTENSIONS, expand_shards, read_samples
from latentae.data.shard_index import ShardIndex, load_index
from latentae.data.sources import shown
from latentae.data.transforms import crop_to_bucket, resize_and_center_crop
from latentae.errors import DataError, ImageError
from latentae.options import Inputs

__all__ = ["Images", "Item", "Labels", "fit_image", "no_label", "open_images", "read_labels"]

LONGEST_SIDE = 1024  # larger images are reduced to it without a resolution, as in `reconstruct`
PIECE = 64  # samples that are fetched from a remote shard at a time

Labels: TypeAlias = Callable[[str, Mapping[str, bytes]], str | None]
"""Key and members of a sample -> its label, or None."""


def no_label(key: str, members: Mapping[str, bytes]) -> str | None:
    """Labels that no sample has."""
    return None


@dataclass(frozen=True)
class Item:
    """One image."""

    number: int
    """Position in the inputs, from 0."""
    key: str
    image: Tensor
    """uint8 or uint16 [C, H, W]."""
    label: str | None


class Images(ABC):
    """Images by number.

    Attributes:
        digest: equal for equal images in equal order.
        count: number of images.
        max_pixels: per image; larger ones are errors.
    """

    digest: str
    count: int
    max_pixels: int = MAX_PIXELS

    @abstractmethod
    def names(self) -> Iterator[tuple[str, str]]:
        """Key and location, for messages, of each image."""

    @abstractmethod
    def raw(self, numbers: Sequence[int]) -> Iterator[tuple[str, str, Mapping[str, bytes]]]:
        """Key, name for messages and members (extension -> bytes), by ascending numbers."""

    def items(
        self,
        numbers: Sequence[int],
        labels: Labels,
        *,
        channels: int,
        resolution: int | None,
        wanted: Callable[[str], bool] = lambda _: True,
    ) -> Iterator[Item]:
        """Decode images.

        Args:
            numbers: which, ascending.
            labels: from `read_labels`.
            channels: 1, 3 or 4.
            resolution: side of the center square; None keeps each image's shape.
            wanted: takes a key; other images are not decoded.

        Raises:
            ImageError: an image can't be decoded.
            ShardError: a shard can't be read.
        """
        short = LONGEST_SIDE if resolution is None else resolution
        for number, (key, name, members) in zip(numbers, self.raw(numbers), strict=True):
            if not wanted(key):
                continue
            extension = image_extension(members)
            if extension is None:
                raise ImageError(f"sample {name} has no image; expected one of {', '.join(IMAGE_EXTENSIONS)}")
            options: dict[str, Any] = {"bits": None, "max_pixels": self.max_pixels, "short": short}
            image = decode_image(members[extension], name, channels=channels, **options)
            yield Item(number, key, fit_image(image, resolution), labels(key, members))


def fit_image(image: Tensor, resolution: int | None) -> Tensor:
    """Crop the center square of a [C, H, W] image; None only limits its longer side."""
    if resolution is not None:
        return resize_and_center_crop(image, resolution)
    height, width = image.shape[1:]
    ratio = LONGEST_SIDE / max(height, width)
    if ratio >= 1:
        return image
    return crop_to_bucket(image, (max(round(height * ratio), 1), max(round(width * ratio), 1)))


class _Files(Images):
    def __init__(self, files: Sequence[SourceImage], digest: str) -> None:
        self._files, self.digest, self.count = files, digest, len(files)

    def names(self) -> Iterator[tuple[str, str]]:
        return ((file.key, str(file.path)) for file in self._files)

    def raw(self, numbers: Sequence[int]) -> Iterator[tuple[str, str, Mapping[str, bytes]]]:
        for number in numbers:
            file = self._files[number]
            try:
                members = {path.suffix[1:].lower(): path.read_bytes() for path in (file.path, *file.sidecars)}
            except OSError as error:
                reason = error.strerror or error
                raise ImageError(f"image {file.path} can't be read ({reason}); check the file") from error
            yield file.key, str(file.path), members


class _Shards(Images):
    def __init__(self, index: ShardIndex) -> None:
        self._index, self.digest, self.count = index, index.digest, index.samples
        self._first = np.cumsum([0, *(entry.samples for entry in index.shards)])

    def names(self) -> Iterator[tuple[str, str]]:
        return ((key, f"{key} in {shard}") for key, shard in self._index.names())

    def raw(self, numbers: Sequence[int]) -> Iterator[tuple[str, str, Mapping[str, bytes]]]:
        bounds = np.searchsorted(np.asarray(numbers), self._first)
        for shard, entry in enumerate(self._index.shards):
            rows = [number - int(self._first[shard]) for number in numbers[bounds[shard] : bounds[shard + 1]]]
            for start in range(0, len(rows), PIECE):
                for raw in read_samples(self._index, shard, rows[start : start + PIECE]):
                    members = {name: data for name, data in raw.items() if name in READ_EXTENSIONS}
                    yield raw["__key__"], f"{raw['__key__']} in {shown(entry.path)}", members


def open_images(inputs: Inputs, what: str = "inputs", max_pixels: int = MAX_PIXELS) -> Images:
    """Find the images of a task.

    Args:
        inputs: a folder of images (searched recursively) or of shards, image files, or shards as a
            file, glob, brace pattern or URL.
        what: their name in messages.
        max_pixels: refuse images of more pixels by their header when they are read.

    Raises:
        DataError: there are none, or two files would have the same key.
    """
    images = _open(inputs, what)
    images.max_pixels = max_pixels
    return images


def _open(inputs: Inputs, what: str) -> Images:
    paths = [inputs] if isinstance(inputs, str | Path) else list(inputs)
    if not paths:
        raise DataError(f"no {what} given; name a folder of images, image files or shards")
    if all(Path(path).suffix[1:].lower() in IMAGE_EXTENSIONS for path in paths):
        return _named_files([Path(path) for path in paths])
    if len(paths) == 1 and Path(paths[0]).is_dir() and not any(Path(paths[0]).glob("*.tar")):
        folder = ImageFolder(Path(paths[0]))
        return _Files(folder.files, folder.listing)
    images = _Shards(load_index(expand_shards([str(path) for path in paths])))
    if not images.count:
        raise DataError(f"the shards of the {what} contain no sample; give others")
    return images


def _named_files(paths: Sequence[Path]) -> Images:
    files: dict[str, SourceImage] = {}
    names: dict[Path, dict[tuple[str, str], list[str]]] = {}
    for path in paths:
        key = escape_key(path.stem)
        if not path.is_file():
            raise DataError(f"no image file {path}; name files, a folder of images or shards")
        if key in files:
            raise DataError(
                f"{files[key].path} and {path} would both be sample {key!r}; give their folder instead"
            )
        if path.parent not in names:
            names[path.parent] = by_stem(entry.name for entry in path.parent.iterdir())
        sidecars = find_sidecars(path, names[path.parent])
        classes = tuple(side for side in sidecars if side.suffix.lower() == ".cls")
        files[key] = SourceImage(path, key, path.stat().st_size, classes)
    return _Files(
        list(files.values()), _digest([[key, file.path.suffix, file.bytes] for key, file in files.items()])
    )


def _digest(rows: Sequence[Any]) -> str:
    return hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()


def read_labels(labels: str | Path) -> tuple[Labels, str]:
    """The source of labels, and its identity for the job.

    Args:
        labels: "auto" is the sample's `.cls` member or file; "folder" is the first folder of its
            key, as in ImageNet and MVTec AD; "none"; or a CSV file with the columns key and label.

    Raises:
        DataError: no such file, or a file without these columns.
    """
    if labels == "none":
        return no_label, "none"
    if labels == "auto":
        return _class_member, "auto"
    if labels == "folder":
        return (lambda key, members: key.partition("/")[0] if "/" in key else None), "folder"
    table = _read_table(Path(labels))

    def from_table(key: str, members: Mapping[str, bytes]) -> str | None:
        return table.get(key, table.get(key.encode("utf-8", "backslashreplace").decode()))

    return from_table, _digest(sorted(table.items()))


def _class_member(key: str, members: Mapping[str, bytes]) -> str | None:
    data = members.get("cls")
    return None if data is None else data.decode("utf-8", "replace").strip()


def _read_table(path: Path) -> dict[str, str]:
    try:
        with path.open(
            newline="", encoding="utf-8", errors="surrogateescape"
        ) as file:  # keys may be any bytes
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise DataError(
            f"labels {path} can't be read ({error}); give auto, folder, none or a CSV file with key,label"
        ) from error
    if not rows or not {"key", "label"} <= set(rows[0]):
        raise DataError(
            f"labels {path} has no columns key and label, or no row; its first line must be key,label"
        )
    return {row["key"]: row["label"] for row in rows if row["label"]}
