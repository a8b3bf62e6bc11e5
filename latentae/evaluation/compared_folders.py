"""Folders that `compare` reads: runs and evaluations, finished or not."""

from __future__ import annotations

import csv
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentae.errors import DataError
from latentae.file_names import EVENTS_LOG, METRICS, METRICS_LOG, PER_IMAGE, RECIPE, RECORD
from latentae.files import read_json
from latentae.pages.curves import Series, read_log

__all__ = ["Subject", "read_subjects"]


@dataclass(frozen=True)
class Subject:
    """A run, an evaluation, or a run with its evaluation.

    Attributes:
        name: shortest end of its path that is unique.
        run: the run folder, if any.
        evaluated: the evaluation's folder, if any.
        recipe: values by dotted key; None without a readable recipe.
        series: every number of the log as (images seen, value).
        record: latentae.json of the run.
        ran_on: hardware at the run's last start.
        evaluation: metrics.json.
        rows: the model's numbers by the image's key and the number of its earlier occurrences.
    """

    name: str
    run: Path | None = None
    evaluated: Path | None = None
    recipe: Mapping[str, Any] | None = None
    series: Mapping[str, Series] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    ran_on: str | None = None
    evaluation: Mapping[str, Any] | None = None
    rows: Mapping[tuple[str, int], Mapping[str, float]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder that was given."""
        path = self.run or self.evaluated
        assert path is not None
        return path

    @property
    def images(self) -> int | None:
        """Images seen at the last line of the log."""
        return int(max(series[-1][0] for series in self.series.values())) if self.series else None


def read_subjects(paths: Sequence[Path]) -> list[Subject]:
    """Read one subject per folder, in order; an evaluation of one of the runs is joined to it.

    Raises:
        DataError: a folder is neither a run nor an evaluation, or can't be read.
    """
    subjects = [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    joined = {subject.name: subject for subject in subjects}
    runs = {subject.run.resolve(): subject.name for subject in subjects if subject.run is not None}
    for found in subjects:
        if found.evaluation is None:
            continue
        run = runs.pop(Path(found.evaluation["model"]["path"]).resolve(), None)
        if run is not None:
            del joined[found.name]
            facts = {"evaluated": found.evaluated, "evaluation": found.evaluation, "rows": found.rows}
            joined[run] = replace(joined[run], **facts)
    return list(joined.values()) if len(joined) > 1 else subjects  # one row would compare nothing


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest unique ends of the paths."""
    parts = [path.resolve().parts for path in paths]
    lengths = range(1, max(map(len, parts)) + 1)
    choices = (["/".join(part[-length:]) for part in parts] for length in lengths)
    return next(names for names in choices if len(set(names)) == len(names))


def _read(path: Path, name: str) -> Subject:
    if (path / METRICS).is_file():
        evaluation = _evaluation(path / METRICS)
        return Subject(name, evaluated=path, evaluation=evaluation, rows=dict(_rows(path / PER_IMAGE)))
    if not _is_run(path):
        raise DataError(_refusal(path))
    log = path / METRICS_LOG
    return Subject(
        name,
        run=path,
        recipe=_recipe(path / RECIPE),
        series=read_log(log) if log.is_file() else {},
        record=_record(path),
        ran_on=_ran_on(path / EVENTS_LOG),
    )


def _record(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        record = read_json(path / RECORD)
        if isinstance(record, dict):
            return record
    return {}


def _is_run(path: Path) -> bool:
    return (path / RECIPE).is_file() or (path / METRICS_LOG).is_file()


def _refusal(path: Path) -> str:
    if not path.is_dir():
        return f"{path} is no folder; give output folders of `latentae train` or `latentae evaluate --out`"
    if _record(path).get("verb") == "evaluate":
        return f"the evaluation in {path} has not finished; run the same `latentae evaluate` again"
    children = sorted(child for child in path.iterdir() if child.is_dir())
    inside = [str(child) for child in children if _is_run(child) or (child / METRICS).is_file()]
    meant = f"did you mean {' or '.join(inside[:3])}?" if inside else "give another folder"
    return f"{path} is neither a run ({RECIPE} or {METRICS_LOG}) nor an evaluation ({METRICS}); {meant}"


def _evaluation(file: Path) -> Mapping[str, Any]:
    try:
        evaluation = read_json(file)
        parts = [evaluation[name] for name in ("model", "data", "metrics")]
        complete = all(isinstance(part, dict) for part in parts) and evaluation["model"]["path"]
    except OSError as error:
        raise DataError(f"could not read {file}: {error.strerror}; evaluate again") from error
    except (ValueError, KeyError, TypeError):
        complete = False
    if not complete:
        raise DataError(
            f"{file} does not hold what `latentae evaluate` writes; evaluate again, into an empty folder"
        )
    return evaluation


def _rows(file: Path) -> Iterator[tuple[tuple[str, int], dict[str, float]]]:
    """The model's columns of per_image.csv, without damaged rows."""
    seen: Counter[str] = Counter()
    with suppress(OSError, csv.Error), file.open(encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines):
            with suppress(ValueError):
                metrics = ("psnr", "ssim", "perceptual")
                values = {name: float(row[name] or math.nan) for name in metrics if row.get(name) is not None}
                if row.get("key") is not None and values:
                    yield (row["key"], seen[row["key"]]), values
                    seen[row["key"]] += 1


def _recipe(file: Path) -> dict[str, Any] | None:
    """Values by dotted key; None if the recipe is missing or damaged."""
    try:
        return dict(_flat(tomllib.loads(file.read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}.{number}")
    else:
        yield prefix, value


def _ran_on(file: Path) -> str | None:
    """Message of the last start in a run's events."""
    found = None
    with suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("kind") == "start":
                    found = str(event.get("message", "")) or found
    return found
