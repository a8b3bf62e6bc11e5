"""One rule for every output folder: the same job resumes, a finished one says so, anything else is refused.

Each verb that fills a folder opens a `Job` on it. The folder then holds `latentae.json`, which names the verb and the
inputs it was started with, and whether it finished. Where several processes share a job, a launcher told each its number.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from latentae.errors import OutputError, RecipeError
from latentae.file_names import RECORD
from latentae.files import json_bytes, write_json
from latentae.version import __version__

__all__ = ["FORMAT_VERSION", "Job", "RemoteJob", "resolve_task", "task_from_environment"]

FORMAT_VERSION = 1

State = Literal["new", "resumed", "finished"]


class _Ends(ABC):
    """How a job ends, wherever its record lies."""

    state: State

    def finish(self, **summary: Any) -> None:
        """Record that everything is in place."""
        self._write(finished=True, **summary)
        self.state = "finished"

    def reopen(self) -> None:
        """Record that something is missing again, so that readers refuse the folder until the same job has run again."""
        self._write(finished=False)
        self.state = "resumed"

    @abstractmethod
    def _write(self, **rest: Any) -> None: ...


@dataclass
class Job(_Ends):
    """An output folder and what is being made in it."""

    folder: Path
    verb: str
    inputs: dict[str, Any]
    state: State
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls, folder: str | Path, verb: str, inputs: Mapping[str, Any], notes: Mapping[str, Any] | None = None
    ) -> Job:
        """Claim `folder` for a job. `inputs` (plain JSON values) are what makes two jobs the same; `notes` are kept beside them.

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
            _refuse_foreign(entries, str(folder), verb)
            job = cls(folder, verb, inputs, "new", dict(notes or {}))
            job._write(finished=False)
            return job
        record = cls.read(folder)
        state = _state(record, str(folder), verb, inputs)
        return cls(folder, verb, inputs, state, _notes(record) if notes is None else dict(notes))

    @staticmethod
    def read(folder: str | Path) -> dict[str, Any]:
        """The record of an output folder; an error if it can't be read or is of a newer format."""
        path = Path(folder) / RECORD
        try:
            return _parse(path.read_bytes(), str(path))
        except OSError as error:
            raise _unreadable(str(path), error) from error

    def _write(self, **rest: Any) -> None:
        write_json(self.folder / RECORD, _compose(self, rest))


@dataclass
class RemoteJob(_Ends):
    """A `Job` on another file system, which its owner reads and writes."""

    folder: str
    """Its address for messages."""
    verb: str
    inputs: dict[str, Any]
    state: State
    write: Callable[[bytes], None]
    """Replaces the record, whole or not at all."""
    notes: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: str,
        record: bytes | None,
        others: Sequence[str],
        verb: str,
        inputs: Mapping[str, Any],
        write: Callable[[bytes], None],
        notes: Mapping[str, Any] | None = None,
    ) -> RemoteJob:
        """`Job.open`, given the record as found, or None and the names of all other files."""
        inputs = dict(inputs)
        if record is None:
            _refuse_foreign(others, folder, verb)
            job = cls(folder, verb, inputs, "new", write, dict(notes or {}))
            job._write(finished=False)
            return job
        there = cls.read(folder, record)
        state = _state(there, folder, verb, inputs)
        return cls(folder, verb, inputs, state, write, _notes(there) if notes is None else dict(notes))

    @staticmethod
    def read(folder: str, record: bytes | None) -> dict[str, Any]:
        """`Job.read`, given the record as found."""
        path = f"{folder}/{RECORD}"
        if record is None:
            raise _unreadable(path, "there is no such file")
        return _parse(record, path)

    def _write(self, **rest: Any) -> None:
        record = _compose(self, rest)
        self.write(json_bytes(record))


def _compose(job: Job | RemoteJob, rest: Mapping[str, Any]) -> dict[str, Any]:
    notes = {"notes": job.notes} if job.notes else {}
    return {
        "format_version": FORMAT_VERSION,
        "latentae": __version__,
        "verb": job.verb,
        "inputs": job.inputs,
        **notes,
        **rest,
    }


def _notes(record: Mapping[str, Any]) -> dict[str, Any]:
    notes = record.get("notes", {})
    return dict(notes) if isinstance(notes, Mapping) else {}


def _unreadable(path: str, reason: object) -> OutputError:
    return OutputError(f"could not read {path} ({reason}); the folder is damaged or not ours, choose another")


def _parse(data: bytes, path: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise _unreadable(path, error) from error
    if not isinstance(record, dict) or record.get("format_version", 0) > FORMAT_VERSION:
        raise OutputError(
            f"{path} is of a newer or unknown format; this version reads up to {FORMAT_VERSION}, upgrade latentae"
        )
    return record


def _refuse_foreign(entries: Sequence[str], folder: str, verb: str) -> None:
    if entries:
        raise OutputError(
            f"{folder} is not empty and was not made by latentae {verb} ({min(entries)} is there); choose another folder"
        )


def _state(record: Mapping[str, Any], folder: str, verb: str, inputs: Mapping[str, Any]) -> State:
    if record.get("verb") != verb:
        raise OutputError(
            f"{folder} was made by latentae {record.get('verb')}, not by {verb}; choose another folder"
        )
    difference = first_difference(record.get("inputs", {}), inputs)
    if difference:
        raise OutputError(
            f"{folder} holds another {verb} job: {difference}; choose another folder, or give the same inputs to resume it"
        )
    return "finished" if record.get("finished") else "resumed"


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first key at which two JSON values differ, as `key is A there and B here`; None when equal."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(k for k in here if k not in there)]:
            difference = first_difference(
                there.get(key), here.get(key), f"{name}.{key}" if name else str(key)
            )
            if difference:
                return difference
        return None
    return None if there == here else f"{name} is {there!r} there and {here!r} here"


def task_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(task_id, num_tasks) as a launcher set them: RANK and WORLD_SIZE, else a SLURM array's variables, else (0, 1)."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        return (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step, int(
            environment["SLURM_ARRAY_TASK_COUNT"]
        )
    return 0, 1


def resolve_task(task_id: int | None, num_tasks: int | None) -> tuple[int, int]:
    """(task_id, num_tasks) as given, else as a launcher set them; RecipeError where they make no sense."""
    if (task_id is None) != (num_tasks is None):
        raise RecipeError(f"task id is {task_id} and num tasks is {num_tasks}; give both or neither")
    task, tasks = (
        task_from_environment(os.environ) if task_id is None or num_tasks is None else (task_id, num_tasks)
    )
    if not 0 <= task < tasks:
        raise RecipeError(f"task id is {task} of {tasks} tasks, expected 0 to {tasks - 1}")
    return task, tasks
