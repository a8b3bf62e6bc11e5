"""Class labels of samples: the member `cls`, or "label" in the member `json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from functools import partial

from latentae.data.sources import read_range, shown, size_of
from latentae.data.tars import Member, Reader, walk_samples
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
        reader = Reader(partial(read_range, path), size_of(path), chunk=1 << 13)

        def take(member: Member, reader: Reader = reader) -> bytes | None:
            wanted = member.name.lower().endswith((".cls", ".json")) and member.size <= MAX_LABEL_BYTES
            return reader.take(member.size) if wanted else None

        for sample, texts in walk_samples(reader, shown(path), take, lambda problem: None):
            try:
                return label_of(texts.get("cls"), texts.get("json")) is not None
            except ValueError as error:
                raise DataError(
                    f"sample {sample.key!r} of {shown(path)} has {error}, {CLASS_NUMBERS}"
                ) from None
    return True
