"""Images of a Hugging Face dataset: a folder of `save_to_disk`, or a dataset by name.

Image files are copied unchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentae.data.folder import escape_key
from latentae.data.headers import image_extension_of
from latentae.errors import DataError, ImageError, MissingDependencyError, first_line
from latentae.progress import say

__all__ = ["ImageDataset", "is_dataset"]

SCHEME = "hf://"
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "webp")  # by preference, if there are several
_LABEL_COLUMNS = ("label", "labels", "cls")


def is_dataset(images: str | Path) -> bool:
    """Whether this names a Hugging Face dataset: `hf://...`, or a folder of `save_to_disk`."""
    if str(images).startswith(SCHEME):
        return True
    folder = Path(images)
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    return saved or (folder / "dataset_dict.json").is_file()


class ImageDataset:
    """The images of a dataset, to pack into shards.

    The package datasets 4 or newer must be installed.

    Args:
        spec: `hf://NAME`, `hf://NAME:SPLIT`, or a folder of `save_to_disk`.

    Raises:
        MissingDependencyError: without the package datasets.
        DataError: the dataset can't be loaded, has several splits and none is named, or has no
            image column.
    """

    def __init__(self, spec: str) -> None:
        datasets = _library()
        self.location, dataset = _open(datasets, spec)
        if not len(dataset):
            raise DataError(f"{self.location} has no rows; choose a split with images")
        features = dataset.features
        self._image = _image_column(datasets, features, self.location)
        self._label = _label_column(datasets, features)
        plain = [name for name, feature in features.items() if _is_plain(datasets, feature)]
        left_out = [name for name in features if name not in plain and name != self._image]
        if left_out:
            say(f"columns {', '.join(left_out)} of {self.location} are not numbers or texts and are left out")
        dataset = dataset.with_format(None).select_columns([self._image, *plain])
        self._dataset = dataset.cast_column(self._image, datasets.Image(decode=False))
        self._features = features
        self._prefix = f"{escape_key(str(dataset.split))}/" if dataset.split is not None else ""
        self.sizes = _sizes(self._dataset, self._image)
        rows = [str(self._dataset.features), self._prefix, self.sizes]
        self.listing = hashlib.blake2b(json.dumps(rows).encode(), digest_size=16).hexdigest()

    def key(self, number: int) -> str:
        """The key of a row: the name of the split and the row's number."""
        return f"{self._prefix}{number:09}"

    def name(self, number: int) -> str:
        """The name of an image in messages."""
        return f"row {number} of {self.location}"

    def load(self, number: int) -> dict[str, bytes]:
        """Extension -> bytes: the image file first, `cls` (class number), `json` (other columns).

        Raises:
            ImageError: the row has no image, or its file can't be read.
        """
        try:
            row = self._dataset[number]
            stored = row.pop(self._image) or {}
            data = stored.get("bytes")
            if data is None and stored.get("path"):
                data = Path(stored["path"]).read_bytes()
        except (OSError, ValueError) as error:
            raise ImageError(f"{self.name(number)} can't be read ({error}); check the dataset") from error
        if not data:
            raise ImageError(f"{self.name(number)} has no image; leave such rows out")
        members: dict[str, bytes] = {image_extension_of(data) or "png": data}  # decoding rejects other data
        label = row.pop(self._label) if self._label else None
        if isinstance(label, int) and label >= 0:  # -1 is a hidden label
            members["cls"] = str(label).encode()
            names = getattr(self._features[self._label], "names", None)
            if names and label < len(names):
                row[self._label] = names[label]
        if row:
            values = {name: _plain(value) for name, value in row.items()}
            members["json"] = json.dumps(values, ensure_ascii=False).encode()
        return members


def _library() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("a Hugging Face dataset needs datasets; pip install datasets") from error
    if int(datasets.__version__.partition(".")[0]) < 4:  # older ones may run a script from the data
        advice = "expected 4 or newer; pip install --upgrade datasets"
        raise MissingDependencyError(f"datasets {datasets.__version__} is too old, {advice}")
    return datasets


def _open(datasets: Any, spec: str) -> tuple[str, Any]:
    """The location of the dataset, including the split, and the dataset."""
    if not spec.startswith(SCHEME):
        loaded = _try(lambda: datasets.load_from_disk(spec), spec)
        if not isinstance(loaded, datasets.DatasetDict):
            return str(Path(spec).resolve()), loaded
        split = _only(list(loaded), spec, f"{Path(spec)}/")
        return str((Path(spec) / split).resolve()), loaded[split]
    name, _, split = spec.removeprefix(SCHEME).partition(":")
    if not name:
        raise DataError(f"{spec} names no dataset; expected hf://NAME or hf://NAME:SPLIT")
    if not split:
        split = _only(_try(lambda: datasets.get_dataset_split_names(name), spec), spec, f"hf://{name}:")
    return f"{SCHEME}{name}:{split}", _try(lambda: datasets.load_dataset(name, split=split), spec)


def _only(splits: list[str], spec: str, before: str) -> str:
    if len(splits) != 1:
        raise DataError(f"{spec} has the splits {', '.join(splits)}; name one, such as {before}{splits[0]}")
    return splits[0]


def _try(load: Callable[[], Any], spec: str) -> Any:
    try:
        return load()
    except Exception as error:  # the library raises many types: no network, no such name, a damaged file
        advice = "check its name and split, and the network"
        raise DataError(f"dataset {spec} can't be loaded ({first_line(error)}); {advice}") from error


def _image_column(datasets: Any, features: Any, location: str) -> str:
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        found = f"{location} has no image column, found {', '.join(features)}"
        raise DataError(f"{found}; cast one to datasets.Image() and save it again")
    known = [name for name in _IMAGE_COLUMNS if name in columns]
    if len(columns) > 1 and not known:
        found = f"{location} has the image columns {', '.join(columns)}"
        raise DataError(f"{found}; keep one, or name one 'image'")
    return (known or columns)[0]


def _label_column(datasets: Any, features: Any) -> str | None:
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    types = {name: str(getattr(features.get(name), "dtype", "")) for name in _LABEL_COLUMNS}
    numbers = [name for name in _LABEL_COLUMNS if types[name].startswith(("int", "uint"))]
    known = [name for name in _LABEL_COLUMNS if name in classes]
    return next(iter([*known, *classes, *numbers]), None)


def _is_plain(datasets: Any, feature: Any) -> bool:
    """Numbers, texts, dates and classes."""
    value = isinstance(feature, datasets.Value) and "binary" not in feature.dtype
    return value or isinstance(feature, datasets.ClassLabel)


def _plain(value: Any) -> Any:
    """A JSON value: a float that is not finite is null, dates are texts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _sizes(dataset: Any, column: str) -> list[int]:
    """Bytes of each image file, without reading one."""
    import numpy as np
    import pyarrow.compute  # pyright: ignore[reportMissingImports]

    compute: Any = pyarrow.compute
    images = dataset.data.column(column)
    sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
    if None in sizes:  # image files outside the dataset
        paths = compute.struct_field(images, "path").to_pylist()
        sizes = [_size(path) if size is None else size for size, path in zip(sizes, paths, strict=True)]
    chosen = dataset._indices  # the rows that select, shuffle and filter leave, in their order
    return sizes if chosen is None else np.asarray(sizes)[np.asarray(chosen.column(0))].tolist()


def _size(path: str | None) -> int:
    with suppress(OSError, TypeError):
        return Path(path or "").stat().st_size
    return 0
