"""The page of `compare`: what differs in the recipes, curves over each other, speed, and metrics with paired intervals."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentae.evaluation.subjects import Subject
from latentae.file_names import METRICS, METRICS_LOG, RECIPE, REPORT, SUMMARY
from latentae.measures.scores import DIGITS, NAMES, UNITS, interval_text
from latentae.pages.charts import MARKERS, Curve, Key, line_plot
from latentae.pages.pictures import LARGEST, read_png, shown
from latentae.pages.report import (
    Block,
    Chart,
    Charts,
    DataTable,
    Legend,
    Links,
    Notices,
    Paragraph,
    Picture,
    Section,
    Strip,
    build_report,
)
from latentae.pages.words import DASH, absent, number
from latentae.progress import duration

__all__ = ["write_compare_page"]

FAMILIES = {"Held-out quality": ("validation/",), "Losses": ("loss/",)}
MACHINERY = {
    "lr": "Learning rate",
    "img_per_s": "Images a second",
    "data_wait": "Share of the time spent waiting for data",
}
SHARES = ("data_wait", "validation/ssim")
SAMPLES = "samples"
FILES = (
    (SUMMARY, "summary"),
    (REPORT, "report"),
    (METRICS_LOG, "log"),
    (RECIPE, "recipe"),
    (METRICS, "metrics"),
)


def write_compare_page(subjects: Sequence[Subject], result: Mapping[str, Any], beside: Path) -> str:
    """The page as HTML.

    Args:
        subjects: what is compared.
        result: what `compare` returns.
        beside: the folder that the page will be in, for links.
    """
    sections = [
        Section("At a glance", list(_glance(subjects, result))),
        *(
            [Section("What differs in the recipes", list(_recipes(result)))]
            if any(subject.run for subject in subjects)
            else []
        ),
        *_curves(subjects),
        *_pictures(subjects),
        *_evaluations(subjects, result),
        Section("Folders", list(_links(subjects, beside))),
    ]
    subtitle = ", ".join(subject.name for subject in subjects)
    footer = f"Made by latentae {result['latentae']}. This page needs no network; links lead to the folders beside it."
    return build_report("Side by side", subtitle, sections, footer)


def _glance(subjects: Sequence[Subject], result: Mapping[str, Any]) -> Iterator[Block]:
    """State, held-out quality and speed of every run, then what to mind."""
    runs = [subject for subject in subjects if subject.run is not None]
    if runs:
        about = {item["name"]: item for item in result["subjects"]}
        header, best = ["run", "images seen"], set()
        rows = [[(run.name, run.ran_on or ""), _progress(about[run.name])] for run in runs]
        for item in result["validation"]:
            header.append(_metric_title(item["metric"], item["higher_is_better"]))
            for row, run in enumerate(runs):
                rows[row].append(_validated(item["values"].get(run.name), item["metric"]))
                if run.name == item["best"]:
                    best.add((row, len(header) - 1))
        if result["training"]:
            header += ["images / s", "training"]
            for row, run in zip(rows, runs, strict=True):
                row += _speed(result["training"].get(run.name))
        caption = (
            "Held-out values are the best so far, with the last under them; the best of a column stands out."
        )
        yield DataTable(header, rows, frozenset(best), caption, wide=True)
    yield Notices(list(_notices(subjects, result)))


def _notices(subjects: Sequence[Subject], result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    unfinished = [item["name"] for item in result["subjects"] if item["finished"] is False]
    if unfinished:
        yield "note", f"Not finished: {', '.join(unfinished)}. Their numbers are those so far."
    for reason, metrics in _by_reason(result["validation"]).items():
        yield "bad", f"Held-out {', '.join(metrics)}: none is called the best, for {reason}."
    unread = [subject.name for subject in subjects if subject.run is not None and subject.recipe is None]
    if unread:
        yield "note", f"No recipe that can be read: {', '.join(unread)}."
    for pair in result["paired"]:
        for metric, difference in pair.get("metrics", {}).items():
            yield _finding(pair, metric, difference)


def _by_reason(validation: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for item in validation:
        if item["reason"] and len(item["values"]) > 1:
            reasons.setdefault(item["reason"], []).append(_name(item["metric"]))
    return reasons


def _finding(pair: Mapping[str, Any], metric: str, difference: Mapping[str, Any]) -> tuple[str, str]:
    names, better = (pair["first"], pair["second"]), difference["better"]
    if difference["mean"] is None or better is None:
        return (
            "note",
            f"{_name(metric)}: no clear difference between {names[0]} and {names[1]} on {pair['images']:,} images.",
        )
    worse = next(name for name in names if name != better)
    low, high = sorted((abs(difference["low"]), abs(difference["high"])))
    amount, digits = abs(difference["mean"]), f".{DIGITS[metric]}f"
    unit = f"{UNITS[metric]} (paired 95 % interval {low:{digits}} to {high:{digits}}, {difference['n']:,} images)"
    return "good", f"{_name(metric)}: {better} beats {worse} by {amount:{digits}}{unit}."


def _progress(item: Mapping[str, Any]) -> tuple[str, str]:
    seen, total = item["images"], item["of"]
    state = "finished" if item["finished"] else "not finished"
    return ("0" if seen is None else f"{seen:,}"), (
        state if not isinstance(total, int) else f"of {total:,}, {state}"
    )


def _validated(value: Mapping[str, float] | None, metric: str) -> tuple[str, str]:
    if value is None:
        return DASH, "not measured"
    form = f".{DIGITS[metric]}f" if metric in DIGITS else ".4g"
    at = f"at {value['best_images']:,.0f}"
    if value["last"] == value["best"]:
        return number(value["best"], form), at
    return number(value["best"], form), f"{at}; last {number(value['last'], form)}"


def _speed(speed: Mapping[str, float | None] | None) -> list[tuple[str, str]]:
    if speed is None:
        return [(DASH, ""), (DASH, "")]
    memory, wall, seconds = speed["memory_gb"], speed["wall_seconds"], speed["seconds"]
    return [
        (number(speed["images_per_second"], ".3g"), "" if memory is None else f"{memory:.3g} GB"),
        (
            DASH if seconds is None else duration(seconds),
            "" if wall is None else f"{duration(wall)} by the clock",
        ),
    ]


def _recipes(result: Mapping[str, Any]) -> Iterator[Block]:
    recipes = result["recipes"]
    if "missing" in recipes:
        yield absent("Recipes", recipes["missing"])
        return
    if not recipes["differing"]:
        yield Paragraph(f"Nothing: all {recipes['same']} keys are the same.")
        return
    names = [
        item["name"]
        for item in result["subjects"]
        if any(item["name"] in row["values"] for row in recipes["differing"])
    ]
    rows = [
        [
            (row["key"], ""),
            *((_value(row["values"][name]) if name in row["values"] else "not set", "") for name in names),
        ]
        for row in recipes["differing"]
    ]
    yield DataTable(["key", *names], rows, caption=f"{recipes['same']} other keys are the same.")


def _value(value: Any) -> str:
    """As TOML writes it, but for quotes."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{', '.join(_value(item) for item in value)}]" if isinstance(value, list) else str(value)


def _curves(subjects: Sequence[Subject]) -> Iterator[Section]:
    """The same quantity of all runs in one chart, a section for each family."""
    names = dict.fromkeys(name for subject in subjects for name in subject.series)
    families = {
        family: sorted((name for name in names if name.startswith(prefixes)), key=_rank)
        for family, prefixes in FAMILIES.items()
    }
    families["Steps and machine"] = [name for name in MACHINERY if name in names]
    keys = [
        Key(subject.name, color, MARKERS[color % len(MARKERS)], "solid")
        for color, subject in enumerate(subjects)
        if subject.series
    ]
    for family, members in families.items():
        if members:
            charts = Charts([_chart(subjects, name) for name in members])
            folded = family == "Steps and machine"
            yield Section(family, [Legend(keys), charts], folded=folded)


def _rank(name: str) -> tuple[int, str]:
    """Total loss, PSNR and SSIM before the others."""
    first = ("loss/total", *(f"validation/{metric}" for metric in NAMES))
    return (first.index(name) if name in first else len(first)), name


def _chart(subjects: Sequence[Subject], name: str) -> Chart:
    curves = [
        Curve(subject.name, subject.series[name], color)
        for color, subject in enumerate(subjects)
        if name in subject.series
    ]
    svg = line_plot(curves, name, x="images seen", counts=True, log_y=False if name in SHARES else None)
    return Chart(svg, MACHINERY.get(name) or _name(name.partition("/")[2]))


def _name(metric: str) -> str:
    if metric in NAMES or metric == "kl":
        return metric.upper()
    words = metric.replace("_", " ")
    return words[:1].upper() + words[1:]


def _metric_title(metric: str, higher: bool | None) -> str:
    unit = f" ({UNITS[metric].strip()})" if UNITS.get(metric) else ""
    return f"{_name(metric)}{unit}" + ("" if higher is None else " ↑" if higher else " ↓")


def _pictures(subjects: Sequence[Subject]) -> list[Section]:
    """The last grid of held-out images that each run wrote."""
    strips: list[Block] = []
    for subject in subjects:
        files = sorted((subject.run / SAMPLES).glob("*.png")) if subject.run is not None else []
        with suppress(OSError):  # being written, or no image any more
            for file in files[-1:]:
                seen = f"after {int(file.stem):,} images" if file.stem.isdigit() else ""
                strips.append(Strip(Picture(shown(read_png(file), 2 * LARGEST), subject.name, seen)))
    caption = Paragraph("The last held-out images of each run above, their reconstructions below.")
    return [Section("Pictures", [*strips, caption])] if strips else []


def _evaluations(subjects: Sequence[Subject], result: Mapping[str, Any]) -> list[Section]:
    evaluated = [subject for subject in subjects if subject.evaluation is not None]
    if not evaluated:
        return []
    evaluation = result["evaluation"]
    blocks: list[Block] = [_metrics_table(evaluated, evaluation)]
    if evaluation["reason"]:
        blocks.append(Notices([("bad", f"None is called the best: {evaluation['reason']}.")]))
    if result["paired"]:
        blocks.append(_paired_table(result["paired"]))
    return [Section("Evaluations", blocks)]


def _metrics_table(evaluated: Sequence[Subject], evaluation: Mapping[str, Any]) -> DataTable:
    header, best = ["evaluation"], set()
    rows = [[(subject.name, _data(subject))] for subject in evaluated]
    for metric, item in evaluation["metrics"].items():
        header.append(item["label"])
        for row, subject in enumerate(evaluated):
            interval = item["values"].get(subject.name)
            rows[row].append((DASH, "") if interval is None else interval_text(metric, interval))
            best |= {(row, len(header) - 1)} if item["best"] == subject.name else set()
    for extractor, item in evaluation["frechet"].items():
        header.append(f"{extractor} ↓")
        for row, subject in enumerate(evaluated):
            rows[row].append((number(item["values"].get(subject.name)), ""))
            best |= {(row, len(header) - 1)} if item["best"] == subject.name else set()
    header += ["latent", "bytes / image", "parameters"]
    for row, subject in zip(rows, evaluated, strict=True):
        row += _size(subject.evaluation or {})
    return DataTable(
        header, rows, frozenset(best), "Mean over images and its 95 % bootstrap interval.", wide=True
    )


def _data(subject: Subject) -> str:
    data = (subject.evaluation or {})["data"]
    return f"{data['images']:,} images at {data['resolution']} px"


def _size(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    latent, parameters = evaluation.get("latent") or {}, evaluation["model"].get("parameters")
    size = (evaluation.get("baselines") or {}).get("latent_8bit", {}).get("bytes_per_image")
    sides = " x ".join(str(side) for side in latent.get("shape", ()))
    floats = f"{number(latent.get('floats_per_pixel'))} floats / pixel" if sides else ""
    return [(sides or DASH, floats), (number(size, ",.0f"), ""), (number(parameters, ",.0f"), "")]


def _paired_table(pairs: Sequence[Mapping[str, Any]]) -> DataTable:
    """A row for each two evaluations and metric: the mean difference and its interval."""
    rows, best = [], set()
    for pair in pairs:
        title = f"{pair['second']} less {pair['first']}"
        if "missing" in pair:
            rows.append([(title, pair["missing"]), (DASH, ""), (DASH, ""), (DASH, "")])
            continue
        for metric, difference in pair["metrics"].items():
            form = f"+.{DIGITS[metric]}f"
            interval = f"{number(difference['low'], form)} to {number(difference['high'], form)}"
            amount = number(difference["mean"], form)
            best |= {(len(rows), 2)} if difference["better"] else set()
            rows.append(
                [
                    (title, f"{pair['images']:,} images"),
                    (_name(metric), ""),
                    (amount, interval),
                    (difference["better"] or "unclear", ""),
                ]
            )
    caption = "Differences of each image, then their mean and its 95 % bootstrap interval; a winner is named where 0 lies outside."
    return DataTable(["paired", "metric", "difference", "better"], rows, frozenset(best), caption)


def _links(subjects: Sequence[Subject], beside: Path) -> Iterator[Block]:
    links = []
    for subject in subjects:
        for folder in filter(None, (subject.run, subject.evaluated)):
            for file, what in FILES:
                if (folder / file).is_file():
                    with suppress(ValueError):  # another drive of Windows has no relative path
                        links.append(
                            (
                                f"{subject.name}: {what}",
                                Path(os.path.relpath(folder / file, beside)).as_posix(),
                            )
                        )
    yield Links([(label, path) for label, path in links if ":" not in path])
