"""The page of `compare`: recipe differences, common charts, speed and paired metrics."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentae.evaluation.compared_folders import Subject
from latentae.file_names import METRICS, METRICS_LOG, RECIPE, REPORT, SUMMARY
from latentae.measures.scores import DIGITS, NAMES, finding, interval_text
from latentae.pages.charts import Chart, legend_key
from latentae.pages.curves import curve_chart, curve_title
from latentae.pages.images import LARGEST, picture, read_png, shrink
from latentae.pages.render import DASH, number, render
from latentae.progress import duration

__all__ = ["write_compare_page"]

Cell = tuple[str, str, bool]  # text, small text under it, whether it is the best of its column
MACHINE = ("lr", "img_per_s", "data_wait")
FILES = {SUMMARY: "summary", REPORT: "report", METRICS_LOG: "log", RECIPE: "recipe", METRICS: "metrics"}


def write_compare_page(subjects: Sequence[Subject], result: Mapping[str, Any], folder: Path) -> str:
    """Render the page as HTML.

    Args:
        subjects: the runs and evaluations.
        result: return value of `compare`.
        folder: where the page will be, for its links.
    """
    runs = [subject for subject in subjects if subject.run is not None]
    recipes = result["recipes"]["differing"]
    return render(
        "comparison.html",
        result=result,
        names=[subject.name for subject in subjects],
        runs=_run_rows(runs, result),
        notices=list(_notices(runs, result)),
        recipe_names=[run.name for run in runs if any(run.name in row["values"] for row in recipes)],
        keys=[legend_key(subject.name, color) for color, subject in enumerate(subjects) if subject.series],
        curves=_curves(subjects),
        pictures=list(_pictures(runs)),
        evaluations=_evaluation_rows(subjects, result["evaluation"]),
        links=list(_links(subjects, folder)),
        digits=DIGITS,
        metric_name=_metric_name,
        toml=_toml,
    )


def _run_rows(runs: Sequence[Subject], result: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """State, held-out quality and speed of every run."""
    about = {item["name"]: item for item in result["subjects"]}
    header = ["run", "images seen", *map(_held_out_title, result["validation"])]
    rows: list[list[Cell]] = []
    for run in runs:
        row = [(run.name, run.ran_on or "", False), _progress(about[run.name])]
        row += [_held_out(item, run.name) for item in result["validation"]]
        rows.append(row + (_speed(result["training"].get(run.name)) if result["training"] else []))
    return {"header": header + (["images / s", "training"] if result["training"] else []), "rows": rows}


def _held_out_title(item: Mapping[str, Any]) -> str:
    arrow = {None: "", True: " ↑", False: " ↓"}[item["higher_is_better"]]
    return curve_title(f"validation/{item['metric']}") + arrow


def _metric_name(metric: str) -> str:
    return NAMES.get(metric) or curve_title(f"loss/{metric}")


def _progress(item: Mapping[str, Any]) -> Cell:
    state = "finished" if item["finished"] else "not finished"
    of = f"of {item['of']:,}, " if isinstance(item["of"], int) else ""
    return f"{item['images'] or 0:,}", of + state, False


def _held_out(item: Mapping[str, Any], name: str) -> Cell:
    value = item["values"].get(name)
    if value is None:
        return DASH, "not measured", False
    form = f".{DIGITS[item['metric']]}f" if item["metric"] in DIGITS else ".4g"
    last = "" if value["last"] == value["best"] else f"; last {number(value['last'], form)}"
    return number(value["best"], form), f"at {value['best_images']:,.0f}{last}", name == item["best"]


def _speed(speed: Mapping[str, float | None] | None) -> list[Cell]:
    if speed is None:
        return [(DASH, "", False)] * 2
    memory, wall, seconds = speed["memory_gb"], speed["wall_seconds"], speed["seconds"]
    return [
        (number(speed["images_per_second"], ".3g"), "" if memory is None else f"{memory:.3g} GB", False),
        (
            DASH if seconds is None else duration(seconds),
            "" if wall is None else f"{duration(wall)} wall-clock time",
            False,
        ),
    ]


def _notices(runs: Sequence[Subject], result: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    unfinished = [item["name"] for item in result["subjects"] if item["finished"] is False]
    if unfinished:
        yield {
            "kind": "note",
            "text": f"Not finished: {', '.join(unfinished)}. Their numbers are preliminary.",
        }
    reasons: dict[str, list[str]] = {}
    for item in result["validation"]:
        if item["reason"] and len(item["values"]) > 1:
            reasons.setdefault(item["reason"], []).append(_metric_name(item["metric"]))
    for reason, metrics in reasons.items():
        yield {"kind": "bad", "text": f"No best run for held-out {', '.join(metrics)}: {reason}."}
    unread = [run.name for run in runs if run.recipe is None]
    if unread:
        yield {"kind": "note", "text": f"No readable recipe: {', '.join(unread)}."}
    for pair in result["paired"]:
        for metric, difference in pair.get("metrics", {}).items():
            yield _finding(pair, metric, difference)


def _finding(pair: Mapping[str, Any], metric: str, difference: Mapping[str, Any]) -> dict[str, str]:
    first, second = pair["first"], pair["second"]
    better = {second: "model", first: "baseline"}.get(difference["better"], "unclear")
    found = finding(metric, _metric_name(metric), {**difference, "better": better}, second, first)
    return {**found, "kind": "note" if better == "unclear" else "good"}


def _toml(value: Any) -> str:
    """A value of a recipe as TOML writes it, without quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, list) else str(value)


def _curves(subjects: Sequence[Subject]) -> dict[str, list[tuple[str, Chart]]]:
    """Title of a section -> titles and charts, each of one quantity of all runs."""
    names = dict.fromkeys(name for subject in subjects for name in subject.series)
    first = ["loss/total", *(f"validation/{metric}" for metric in NAMES)]
    ordered = first + sorted(name for name in names if name not in first)
    groups = {
        "Held-out quality": [name for name in ordered if name in names and name.startswith("validation/")],
        "Losses": [name for name in ordered if name in names and name.startswith("loss/")],
        "Steps and machine": [name for name in MACHINE if name in names],
    }
    lines = {name: {subject.name: subject.series.get(name, ()) for subject in subjects} for name in names}
    return {
        title: [(curve_title(name), curve_chart(lines[name], name)) for name in members]
        for title, members in groups.items()
    }


def _pictures(runs: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """The last grid of held-out images of each run."""
    for run in runs:
        assert run.run is not None
        for file in sorted((run.run / "samples").glob("*.png"))[-1:]:
            seen = f"after {int(file.stem):,} images" if file.stem.isdigit() else ""
            with suppress(OSError):  # the run is still writing it, or it is damaged
                yield picture(shrink(read_png(file), 2 * LARGEST), run.name, seen)


def _evaluation_rows(subjects: Sequence[Subject], found: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    metrics, frechet = found["metrics"], found["frechet"]
    header = ["evaluation", *(item["label"] for item in metrics.values()), *(f"{name} ↓" for name in frechet)]
    rows: list[list[Cell]] = []
    for subject in subjects:
        if subject.evaluation is None:
            continue
        name, data = subject.name, subject.evaluation["data"]
        row = [(name, f"{data['images']:,} images at {data['resolution']} px", False)]
        for metric, item in metrics.items():
            text, small = (
                interval_text(metric, item["values"][name]) if name in item["values"] else (DASH, "")
            )
            row.append((text, small, item["best"] == name))
        row += [(number(item["values"].get(name)), "", item["best"] == name) for item in frechet.values()]
        rows.append(row + _size(subject.evaluation))
    return {"header": [*header, "latent", "bytes / image", "parameters"], "rows": rows}


def _size(evaluation: Mapping[str, Any]) -> list[Cell]:
    latent = evaluation.get("latent") or {}
    size = (evaluation.get("baselines") or {}).get("latent_8bit", {}).get("bytes_per_image")
    shape = " x ".join(map(str, latent.get("shape", ())))
    floats = f"{number(latent.get('floats_per_pixel'))} floats / pixel" if shape else ""
    parameters = evaluation["model"].get("parameters")
    return [
        (shape or DASH, floats, False),
        (number(size, ",.0f"), "", False),
        (number(parameters, ",.0f"), "", False),
    ]


def _links(subjects: Sequence[Subject], folder: Path) -> Iterator[tuple[str, str]]:
    for subject in subjects:
        for home in filter(None, (subject.run, subject.evaluated)):
            for file, what in FILES.items():
                with suppress(ValueError):  # another drive of Windows has no relative path
                    path = Path(os.path.relpath(home / file, folder)).as_posix()
                    if (home / file).is_file() and ":" not in path:
                        yield f"{subject.name}: {what}", path
