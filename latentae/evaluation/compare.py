"""The verb `compare`: runs and evaluations on one page that opens offline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.errors import OutputError, RecipeError
from latentae.evaluation.compared_folders import Subject, read_subjects
from latentae.evaluation.options import CompareOptions
from latentae.files import write_text
from latentae.measures.scores import HIGHER_IS_BETTER, SAME, Scores, interval_text, metric_label, paired
from latentae.options import verb
from latentae.pages.curves import run_speed
from latentae.progress import say
from latentae.version import __version__

__all__ = ["compare"]

VALIDATION = "validation/"
DATA_OF_VALIDATION = (
    "data.validation",
    "data.resolution",
)  # keys of a recipe that decide what a run validates on
SEED = 0  # of the bootstrap


@verb(CompareOptions)
def compare(options: CompareOptions) -> dict[str, Any]:
    """Compare the recipes, curves, speed and metrics of runs and evaluations.

    A run may still be training. An evaluation of one of the runs is shown with it. Values that are
    not comparable (other images, another perceptual network) are shown, but none is marked as the
    best.

    Returns:
        The numbers on the page: `subjects` (what is compared), `recipes` (the keys that differ),
        `validation`, `training` (speed and time), `evaluation` (metrics by subject) and `paired`
        (differences on the same images).

    Raises:
        RecipeError: fewer than two folders, or one given twice.
        DataError: a folder is neither a run nor an evaluation, or can't be read.
        OutputError: the page can't be written.
    """
    from latentae.evaluation.compare_page import write_compare_page

    page = Path(options.out) / "compare.html" if Path(options.out).is_dir() else Path(options.out)
    if page.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"the page is written as HTML, got {options.out}; give a name that ends in .html")
    paths = [Path(run) for run in ([options.runs] if isinstance(options.runs, str | Path) else options.runs)]
    if len(paths) < 2:
        raise RecipeError(
            f"compare takes two or more folders of runs or evaluations, got {len(paths)}; name another one"
        )
    twice = next((a for a, b in itertools.combinations(paths, 2) if a.resolve() == b.resolve()), None)
    if twice is not None:
        raise RecipeError(f"{twice} is given twice; a folder is compared with others")
    subjects = read_subjects(paths)
    result = _result(subjects)
    write_text(page, write_compare_page(subjects, result, page.parent))
    _print(result)
    say(f"compared {len(subjects)}; see {page}")
    return result


def _result(subjects: Sequence[Subject]) -> dict[str, Any]:
    evaluated = [subject for subject in subjects if subject.evaluation is not None]
    return {
        "latentae": __version__,
        "subjects": [_about(subject) for subject in subjects],
        "recipes": _recipes(subjects),
        "validation": _validation(subjects),
        "training": {subject.name: speed for subject in subjects if (speed := run_speed(subject.series))},
        "evaluation": _evaluations(evaluated),
        "paired": list(_paired(evaluated)),
    }


def _about(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "run": None if subject.run is None else str(subject.run),
        "evaluation": None if subject.evaluated is None else str(subject.evaluated),
        "finished": None if subject.run is None else bool(subject.record.get("finished")),
        "images": subject.images,
        "of": None if subject.recipe is None else subject.recipe.get("images"),
        "ran_on": subject.ran_on,
    }


def _recipes(subjects: Sequence[Subject]) -> dict[str, Any]:
    """Keys that differ between recipes, each with its values by subject."""
    known = {subject.name: subject.recipe for subject in subjects if subject.recipe is not None}
    if len(known) < 2:
        return {"missing": "it takes the recipes (recipe.toml) of two runs", "differing": [], "same": 0}
    keys = dict.fromkeys(itertools.chain.from_iterable(known.values()))
    rows = [
        {"key": key, "values": {name: recipe[key] for name, recipe in known.items() if key in recipe}}
        for key in keys
    ]
    differing = [
        row
        for row in rows
        if len(row["values"]) < len(known) or len({repr(value) for value in row["values"].values()}) > 1
    ]
    return {"differing": differing, "same": len(rows) - len(differing)}


def _validation(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Last and best value of each validation metric by subject, and the best subject."""
    found = []
    names = dict.fromkeys(
        name for subject in subjects for name in subject.series if name.startswith(VALIDATION)
    )
    for name in names:
        metric = name.removeprefix(VALIDATION)
        higher, values = HIGHER_IS_BETTER.get(metric), {}
        for subject in subjects:
            series = subject.series.get(name)
            if series:
                images, last = series[-1]
                best_images, best = series[-1] if higher is None else _best_point(series, higher)
                values[subject.name] = {
                    "last": last,
                    "images": images,
                    "best": best,
                    "best_images": best_images,
                }
        reason = _not_comparable([subject for subject in subjects if subject.name in values], metric)
        winner = None
        if higher is not None and reason is None:
            winner = _winner({name: value["best"] for name, value in values.items()}, higher)
        found.append(
            {"metric": metric, "higher_is_better": higher, "values": values, "best": winner, "reason": reason}
        )
    return found


def _winner(values: Mapping[str, float], higher: bool) -> str | None:
    """The subject with the best value; None for a tie."""
    best = (max if higher else min)(values.values(), default=0.0)
    winners = [name for name, value in values.items() if math.isclose(value, best, rel_tol=SAME)]
    return winners[0] if len(winners) == 1 < len(values) else None


def _best_point(series: Sequence[tuple[float, float]], higher: bool) -> tuple[float, float]:
    return (max if higher else min)(series, key=lambda point: point[1])


def _not_comparable(subjects: Sequence[Subject], metric: str) -> str | None:
    """Why validation values are not comparable between runs; None if their recipes agree."""
    recipes = [subject.recipe for subject in subjects if subject.recipe is not None]
    keys = [*DATA_OF_VALIDATION, *(("loss.perceptual.net",) if metric == "perceptual" else ())]
    if any(recipe.get("data.validation") == "auto" for recipe in recipes):
        keys += ["data.shards", "data.validation_fraction"]
    different = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    return f"the runs differ in {', '.join(different)}" if different else None


def _evaluations(evaluated: Sequence[Subject]) -> dict[str, Any]:
    """Metrics by subject, and the best subject if all evaluations use the same images."""
    results = {subject.name: subject.evaluation for subject in evaluated if subject.evaluation is not None}
    names = dict.fromkeys(metric for result in results.values() for metric in result["metrics"])
    reason = next(
        (why for a, b in itertools.combinations(results.values(), 2) if (why := _other_images(a, b))), None
    )
    metrics = {}
    for metric in names:
        values = {
            name: result["metrics"][metric] for name, result in results.items() if metric in result["metrics"]
        }
        labels = {metric_label(metric, results[name]) for name in values}
        means = {name: interval["mean"] for name, interval in values.items() if interval["mean"] is not None}
        best = _winner(means, HIGHER_IS_BETTER[metric]) if reason is None and len(labels) == 1 else None
        label = (
            labels.pop()
            if len(labels) == 1
            else f"perceptual distance {'↑' if HIGHER_IS_BETTER[metric] else '↓'}"
        )
        metrics[metric] = {"label": label, "values": values, "best": best}
    return {"metrics": metrics, "reason": reason, "frechet": _frechet(results, reason)}


def _frechet(results: Mapping[str, Mapping[str, Any]], reason: str | None) -> dict[str, Any]:
    """Frechet distances by extractor and subject, and the best subject."""
    by_extractor: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        found = result.get("frechet") or {}
        value = found.get("values", {}).get("model")
        if value is not None:
            by_extractor.setdefault(found["name"], {})[name] = value
    return {
        extractor: {
            "values": values,
            "best": _winner(values, higher=False) if reason is None else None,
        }
        for extractor, values in by_extractor.items()
    }


def _other_images(a: Mapping[str, Any], b: Mapping[str, Any]) -> str | None:
    """Why two evaluations use different images; None if they may use the same."""
    for key, name in (("digest", "shards"), ("resolution", "resolution"), ("channels", "channels")):
        if a["data"].get(key) != b["data"].get(key):
            return f"the evaluations are of other images ({name} differ)"
    return None


def _paired(evaluated: Sequence[Subject]) -> Iterator[dict[str, Any]]:
    """Differences, second minus first, of each pair of evaluations on their common images."""
    for a, b in itertools.combinations(evaluated, 2):
        assert a.evaluation is not None
        assert b.evaluation is not None
        pair: dict[str, Any] = {"first": a.name, "second": b.name}
        reason = _other_images(a.evaluation, b.evaluation)
        keys = [key for key in a.rows if key in b.rows]
        if reason is None and not keys:
            reason = "they have no image in common, or per_image.csv is missing"
        if reason is not None:
            yield {**pair, "missing": reason}
            continue
        scores = [_scores([subject.rows[key] for key in keys]) for subject in (a, b)]
        if metric_label("perceptual", a.evaluation) != metric_label("perceptual", b.evaluation):
            scores[0].values.pop("perceptual", None)
        differences = {
            metric: {**difference, "better": {"model": b.name, "baseline": a.name}.get(difference["better"])}
            for metric, difference in paired(scores[1], scores[0], SEED).items()
        }
        yield {**pair, "images": len(keys), "metrics": differences}


def _scores(rows: Sequence[Mapping[str, float]]) -> Scores:
    metrics = [metric for metric in HIGHER_IS_BETTER if all(metric in row for row in rows)]
    return Scores({metric: [row[metric] for row in rows] for metric in metrics})


def _print(result: Mapping[str, Any]) -> None:
    """Print the numbers as a table, the best in bold."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = [subject["name"] for subject in result["subjects"]]
    table = Table(title="Side by side", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold")
    for title, texts, best in _table_rows(result):
        table.add_row(title, *(Text(texts.get(name, "-"), "bold" if name == best else "") for name in names))
    console = Console()
    console.print(table)
    differing = result["recipes"]["differing"]
    if differing:
        text = f"{len(differing)} keys of the recipes differ: {', '.join(row['key'] for row in differing)}"
        console.print(text, markup=False, highlight=False)


def _table_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str], str | None]]:
    """Title, text by subject, and the best subject."""
    yield (
        "images seen",
        {item["name"]: f"{item['images']:,}" for item in result["subjects"] if item["images"] is not None},
        None,
    )
    for item in result["validation"]:
        texts = {
            name: f"{value['best']:.4g} at {value['best_images']:,.0f}"
            for name, value in item["values"].items()
        }
        yield f"held-out {item['metric']}, best", texts, item["best"]
    speeds = {name: f"{speed['images_per_second']:.3g}" for name, speed in result["training"].items()}
    if speeds:
        yield "images a second", speeds, None
    for metric, item in result["evaluation"]["metrics"].items():
        texts = {
            name: "{} ({})".format(*interval_text(metric, interval))
            for name, interval in item["values"].items()
        }
        yield item["label"], texts, item["best"]
    for extractor, item in result["evaluation"]["frechet"].items():
        yield f"{extractor} ↓", {name: f"{value:.4g}" for name, value in item["values"].items()}, item["best"]
