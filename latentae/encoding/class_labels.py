"""Class labels of samples: the member `cls`, or "label" in the member `json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress

from latentae.data.sources import read_range, shown, size_of
from latentae.data.tars import Reader, group, walk
from latentae.errors import DataError

__all__ = ["CLASS_NUMBERS", "MAX_LABEL_BYTES", "MISSING_LABELS", "has_label", "label_of"]

CLASS_NUMBERS = 'but classes are whole numbers from 0; write them into `cls`, or into `json` as "label"'
MISSING_LABELS = 'give each a `cls` member, or a `json` with a whole number as "label"'
MAX_LABEL_BYTES = 1 << 20  # larger members are not searched for a label


def label_of(cls: bytes | None, text: bytes | None) -> int | None:
    """The class label of a sample. A whole number may be written as 3, "3", 3.0 or true.

    Args:
        cls: the member `cls`, which takes precedence.
        text: the member `json`.

    Returns:
        The class from 0; None if there is no label, or it is empty, null or -1.

    Raises:
        ValueError: the label is no class number. The message says what was found.
    """
    try:
        record = json.loads(text) if cls is None and text is not None else None
    except (ValueError, RecursionError):
        raise ValueError("a json that can't be read") from None
    value = record.get("label") if isinstance(record, dict) else None
    if cls is not None:
        value = cls.decode("utf-8", "replace").strip()
    if value in (None, ""):
        return None
    number = _whole(value)
    if number is None or not -1 <= number < 1 << 63:
        raise ValueError(f"the label {value!r}")
    return None if number == -1 else number


def _whole(value: object) -> int | None:
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    if isinstance(value, int | float | str):
        with suppress(ValueError):
            return int(number) if (number := float(value)).is_integer() else None
    return None


def has_label(shards: Iterable[str]) -> bool:
    """Whether the first sample of image shards has a class label. True if there are no samples.

    Raises:
        ShardError: a shard can't be read.
        DataError: the label is no class number.
    """
    for path in shards:

        def fetch(start: int, stop: int, path: str = path) -> bytes:
            return read_range(path, start, stop)

        reader = Reader(fetch, size_of(path), chunk=1 << 13)
        for sample in group(walk(reader, shown(path)), lambda problem: None):
            texts = {
                extension: fetch(offset, offset + size)
                for extension, offset, size in sample.members
                if extension in ("cls", "json") and size <= MAX_LABEL_BYTES
            }
            try:
                return label_of(texts.get("cls"), texts.get("json")) is not None
            except ValueError as error:
                raise DataError(
                    f"sample {sample.key!r} of {shown(path)} has {error}, {CLASS_NUMBERS}"
                ) from None
    return True
