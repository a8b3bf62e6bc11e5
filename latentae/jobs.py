"""Output folders: the same job resumes, a finished job does nothing, others are refused.

A verb that fills a folder opens a `Job` on it. The folder then has `latentae.json` with the verb,
the inputs that identify the job, and whether it is finished. Processes that share a job each get a
number from their launcher.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from latentae.errors import OutputError, RecipeError
from latentae.file_names import RECORD
from latentae.files import INCOMPLETE, json_bytes, write_bytes
from latentae.version import __version__

__all__ = ["FORMAT_VERSION", "Job", "first_difference", "resolve_task", "task_from_environment"]

FORMAT_VERSION = 1


@dataclass
class Job:
    """An output folder and the job that fills it."""

    folder: Path
    """Of another file system: its address, which is no path here."""
    verb: str
    inputs: dict[str, Any]
    state: Literal["new", "resumed", "finished"]
    write: Callable[[bytes], None]
    """Replaces the record atomically."""
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        verb: str,
        inputs: Mapping[str, Any],
        notes: Mapping[str, Any] | None = None,
        foreign: Callable[[str], bool] = lambda name: True,
    ) -> Job:
        """Claim `folder` for a job.

        Args:
            folder: created if it does not exist.
            verb: name of the verb.
            inputs: plain JSON values that identify the job.
            notes: plain JSON values that the record also keeps.
            foreign: takes a file's name; a new job refuses a folder with such a file.

        Raises:
            OutputError: the folder can't be created, or holds anything but this job.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = [entry.name for entry in folder.iterdir() if not entry.name.endswith(INCOMPLETE)]
        except OSError as error:
            raise OutputError(f"could not use {folder} as an output folder: {error.strerror}") from error
        record = cls.read(folder) if RECORD in names else None
        write = partial(write_bytes, folder / RECORD)
        return cls.claim(folder, record, list(filter(foreign, names)), verb, inputs, write, notes)

    @classmethod
    def claim(
        cls,
        folder: str | Path,
        record: Mapping[str, Any] | None,
        names: Sequence[str],
        verb: str,
        inputs: Mapping[str, Any],
        write: Callable[[bytes], None],
        notes: Mapping[str, Any] | None = None,
    ) -> Job:
        """`open`, given the record of the folder, or None and the names of other files.

        A folder on another file system is an address, for messages.
        """
        if record is None:
            if names:
                raise OutputError(
                    f"{folder} already contains {min(names)}, which latentae {verb} did not write; "
                    "choose another folder"
                )
            job = cls(Path(folder), verb, dict(inputs), "new", write, dict(notes or {}))
            job._record(finished=False)
            return job
        _check_same(record, folder, verb, inputs)
        state = "finished" if record.get("finished") else "resumed"
        kept = record.get("notes", {}) if notes is None else notes
        return cls(
            Path(folder), verb, dict(inputs), state, write, dict(kept) if isinstance(kept, Mapping) else {}
        )

    @classmethod
    def read(cls, folder: str | Path) -> dict[str, Any]:
        """The record of an output folder.

        Raises:
            OutputError: it can't be read, or has a newer format.
        """
        path = Path(folder) / RECORD
        try:
            return cls.parse(path.read_bytes(), path)
        except OSError as error:
            raise _unreadable(path, error) from error

    @staticmethod
    def parse(data: bytes | None, path: str | Path) -> dict[str, Any]:
        """`read` for the content of a record at `path`; None if it does not exist."""
        if data is None:
            raise _unreadable(path, "there is no such file")
        try:
            record = json.loads(data)
        except ValueError as error:
            raise _unreadable(path, error) from error
        if not isinstance(record, dict) or record.get("format_version", 0) > FORMAT_VERSION:
            raise OutputError(
                f"{path} has a newer or unknown format; this version reads up to {FORMAT_VERSION}, "
                "upgrade latentae"
            )
        return record

    def finish(self, **summary: Any) -> None:
        """Record that all files are written."""
        self._record(finished=True, **summary)
        self.state = "finished"

    def reopen(self) -> None:
        """Record that a file is missing again; readers refuse the folder until the job has run."""
        self._record(finished=False)
        self.state = "resumed"

    def _record(self, **rest: Any) -> None:
        notes = {"notes": self.notes} if self.notes else {}
        record = {
            "format_version": FORMAT_VERSION,
            "latentae": __version__,
            "verb": self.verb,
            "inputs": self.inputs,
        }
        self.write(json_bytes({**record, **notes, **rest}))


def _unreadable(path: str | Path, reason: object) -> OutputError:
    return OutputError(
        f"could not read {path} ({reason}); the folder is damaged or not of latentae, choose another"
    )


def _check_same(record: Mapping[str, Any], folder: object, verb: str, inputs: Mapping[str, Any]) -> None:
    if record.get("verb") != verb:
        raise OutputError(
            f"{folder} was written by latentae {record.get('verb')}, not by {verb}; choose another folder"
        )
    difference = first_difference(record.get("inputs", {}), inputs)
    if difference:
        raise OutputError(
            f"{folder} holds another {verb} job: {difference}; choose another folder, "
            "or repeat the original options to resume"
        )


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first key at which two JSON values differ, with both values; None if they are equal."""
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        before, now = ("not set" if value is None else repr(value) for value in (there, here))
        return None if there == here else f"{name} was {before} and is now {now}"
    for key in dict.fromkeys([*there, *here]):
        difference = first_difference(there.get(key), here.get(key), f"{name}.{key}" if name else str(key))
        if difference:
            return difference
    return None


def resolve_task(task_id: int | None, num_tasks: int | None) -> tuple[int, int]:
    """(task_id, num_tasks) as given, or else from the launcher.

    Raises:
        RecipeError: only one is given, or `task_id` is not below `num_tasks`.
    """
    if (task_id is None) != (num_tasks is None):
        raise RecipeError(f"task_id is {task_id} and num_tasks is {num_tasks}; give both or neither")
    given = None if task_id is None or num_tasks is None else (task_id, num_tasks)
    task, tasks = given or task_from_environment(os.environ)
    if not 0 <= task < tasks:
        raise RecipeError(f"task_id is {task} of {tasks} tasks, expected 0 to {tasks - 1}")
    return task, tasks


def task_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(task_id, num_tasks) from torchrun's or SLURM's variables, or else (0, 1)."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        task = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        return task, int(environment["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1
