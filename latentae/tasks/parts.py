"""A task over many images, done in parts, so that the same command resumes it."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.files import atomic_file, read_json, write_json
from latentae.jobs import Job
from latentae.progress import Progress, say

__all__ = ["PartedJob"]

SUMMARY = "summary.json"


class PartedJob:
    """An output folder that is filled from inputs 0 to `total`, in parts of `size`.

    The rows of finished parts wait under `parts/` until all are there.

    Args:
        folder: output folder.
        verb: the task's name.
        inputs: identity of the job.
        total: number of inputs.
        size: inputs per part.

    Raises:
        OutputError: the folder can't be used or holds something else.
    """

    def __init__(
        self, folder: str | Path, verb: str, inputs: Mapping[str, Any], total: int, size: int
    ) -> None:
        self.folder, self._verb = Path(folder), verb
        self._job = Job.open(folder, verb, inputs)
        self._total, self._size = total, size
        self._parts = self.folder / "parts"

    def earlier_result(self) -> dict[str, Any] | None:
        """The summary of the job if it is finished."""
        if self._job.state != "finished":
            return None
        say(f"{self._verb}: {self.folder} already holds this result; see {self.folder / SUMMARY}")
        return read_json(self.folder / SUMMARY)

    def run(self, make: Callable[[int, range, Progress], Sequence[Mapping[str, Any]]]) -> None:
        """Do all parts that are not finished.

        Args:
            make: takes a part's number and inputs, writes its files and returns its table rows.
        """
        with Progress(self._verb, self._total) as progress:
            for part, file in enumerate(self._files()):
                inputs = range(part * self._size, min((part + 1) * self._size, self._total))
                if file.is_file():
                    progress.advance(len(inputs))
                else:
                    write_json(file, list(make(part, inputs, progress)))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all parts in order; memory holds one part."""
        for file in self._files():
            yield from read_json(file)

    def write_table(self, file: str, columns: Sequence[str]) -> None:
        """Write all rows as one CSV; None is an empty cell, keys that are not UTF-8 are escaped."""
        options: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with atomic_file(self.folder / file) as temporary, temporary.open("w", **options) as target:
            writer = csv.writer(target, lineterminator="\n")
            writer.writerow(columns)
            for row in self.rows():
                writer.writerow(["" if row[name] is None else row[name] for name in columns])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the summary, record that the job is finished and remove the kept rows."""
        write_json(self.folder / SUMMARY, result)
        self._job.finish(images=self._total)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [self._parts / f"{part:05}.json" for part in range(-(-self._total // self._size))]
