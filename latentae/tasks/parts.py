"""Long work in parts: each is finished or not begun, so the same command goes on where it stopped."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.files import atomic_file, read_json, write_json
from latentae.progress import Progress

__all__ = ["Parts"]


class Parts:
    """Inputs 0 to `total` in parts of `size`; of each finished one the rows of a table are kept until all are there.

    Args:
        folder: of the job; rows wait under `parts/` in it.
        total: inputs in all.
        size: inputs of a part.
    """

    def __init__(self, folder: Path, total: int, size: int) -> None:
        self._folder, self._total, self._size = folder / "parts", total, size

    def todo(self, progress: Progress) -> Iterator[tuple[int, range]]:
        """Number and inputs of each part that is not finished; finished ones are counted on the progress bar."""
        for part in range(self.count):
            inputs = range(part * self._size, min((part + 1) * self._size, self._total))
            if self._file(part).is_file():
                progress.advance(len(inputs))
            else:
                yield part, inputs

    @property
    def count(self) -> int:
        """How many parts there are."""
        return -(-self._total // self._size)

    def done(self, part: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Mark a part as finished: call it when its files are in place."""
        write_json(self._file(part), list(rows))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all parts in order; a finished part each at a time is in memory."""
        for part in range(self.count):
            yield from read_json(self._file(part))

    def write_table(self, file: Path, columns: Sequence[str]) -> None:
        """Write the rows of all parts as one CSV; None is an empty cell, floats have all digits, keys that are not UTF-8 are escaped."""
        options: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with atomic_file(file) as temporary, temporary.open("w", **options) as target:
            writer = csv.writer(target, lineterminator="\n")
            writer.writerow(columns)
            for row in self.rows():
                writer.writerow(["" if row[name] is None else row[name] for name in columns])

    def clear(self) -> None:
        """Remove the kept rows: call it when what was made of them is in place and the job is finished."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _file(self, part: int) -> Path:
        return self._folder / f"{part:05}.json"
