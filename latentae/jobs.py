"""One rule for every output folder: the same job resumes, a finished one says so, anything else is refused.

Each verb that fills a folder opens a `Job` on it. The folder then holds `latentae.json`, which names the verb and the
inputs it was started with, and whether it finished.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from latentae.errors import OutputError
from latentae.files import read_json, write_json
from latentae.version import __version__

__all__ = ["FORMAT_VERSION", "Job"]

FORMAT_VERSION = 1
RECORD = "latentae.json"


@dataclass
class Job:
    """An output folder and what is being made in it."""

    folder: Path
    verb: str
    inputs: dict[str, Any]
    state: Literal["new", "resumed", "finished"]

    @classmethod
    def open(cls, folder: str | Path, verb: str, inputs: Mapping[str, Any]) -> Job:
        """Claim `folder` for a job. `inputs` (plain JSON values) are what makes two jobs the same.

        Raises:
            OutputError: the folder can't be made, or holds anything but this very job.
        """
        folder, inputs = Path(folder), dict(inputs)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entries = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".incomplete")]
        except OSError as error:
            raise OutputError(f"could not use {folder} as an output folder: {error.strerror}") from error
        if RECORD not in entries:
            if entries:
                raise OutputError(
                    f"{folder} is not empty and was not made by latentae {verb} ({sorted(entries)[0]} is there); choose another folder"
                )
            job = cls(folder, verb, inputs, "new")
            job._write(finished=False)
            return job
        record = cls.read(folder)
        if record.get("verb") != verb:
            raise OutputError(f"{folder} was made by latentae {record.get('verb')}, not by {verb}; choose another folder")
        difference = first_difference(record.get("inputs", {}), inputs)
        if difference:
            raise OutputError(
                f"{folder} holds another {verb} job: {difference}; choose another folder, or give the same inputs to resume it"
            )
        return cls(folder, verb, inputs, "finished" if record.get("finished") else "resumed")

    @staticmethod
    def read(folder: str | Path) -> dict[str, Any]:
        """The record of an output folder; an error if it can't be read or is of a newer format."""
        path = Path(folder) / RECORD
        try:
            record = read_json(path)
        except (OSError, ValueError) as error:
            raise OutputError(f"could not read {path} ({error}); the folder is damaged or not ours, choose another") from error
        if not isinstance(record, dict) or record.get("format_version", 0) > FORMAT_VERSION:
            raise OutputError(
                f"{path} is of a newer or unknown format; this version reads up to {FORMAT_VERSION}, upgrade latentae"
            )
        return record

    def finish(self, **summary: Any) -> None:
        """Record that everything is in place."""
        self._write(finished=True, **summary)
        self.state = "finished"

    def _write(self, **rest: Any) -> None:
        write_json(
            self.folder / RECORD,
            {"format_version": FORMAT_VERSION, "latentae": __version__, "verb": self.verb, "inputs": self.inputs, **rest},
        )


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first key at which two JSON values differ, as `key is A there and B here`; None when equal."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(k for k in here if k not in there)]:
            difference = first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
            if difference:
                return difference
        return None
    return None if there == here else f"{name} is {there!r} there and {here!r} here"
