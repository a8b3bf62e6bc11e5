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
VALIDATION_KEYS = "data.validation", "data.resolution"  # of a recipe, for its validation images
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
    for a, b in itertools.combinations(paths, 2):
        if a.resolve() == b.resolve():
            raise RecipeError(f"{a} is given twice; a folder is compared with others")
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
    differing, keys = [], dict.fromkeys(itertools.chain.from_iterable(known.values()))
    for key in keys:
        values = {name: recipe[key] for name, recipe in known.items() if key in recipe}
        if len(values) < len(known) or len(set(map(repr, values.values()))) > 1:
            differing.append({"key": key, "values": values})
    return {"differing": differing, "same": len(keys) - len(differing)}


def _validation(subjects: Sequence[Subject]) -> list[dict[str, Any]]:
    """Last and best value of each validation metric by subject, and the best subject."""
    found = []
    names = dict.fromkeys(name for subject in subjects for name in subject.series)
    for name in filter(lambda name: name.startswith(VALIDATION), names):
        metric = name.removeprefix(VALIDATION)
        higher, values = HIGHER_IS_BETTER.get(metric), {}
        measured = [subject for subject in subjects if subject.series.get(name)]
        for subject in measured:
            series = subject.series[name]
            best = (
                series[-1] if higher is None else (max if higher else min)(series, key=lambda point: point[1])
            )
            facts = {"last": series[-1][1], "images": series[-1][0], "best": best[1], "best_images": best[0]}
            values[subject.name] = facts
        reason = _not_comparable(measured, metric)
        bests, winner = {name: value["best"] for name, value in values.items()}, None
        if higher is not None and reason is None:
            winner = _winner(bests, higher)
        facts = {"metric": metric, "higher_is_better": higher}
        found.append({**facts, "values": values, "best": winner, "reason": reason})
    return found


def _winner(values: Mapping[str, float], higher: bool) -> str | None:
    """The subject with the best value; None for a tie."""
    best = (max if higher else min)(values.values(), default=0.0)
    winners = [name for name, value in values.items() if math.isclose(value, best, rel_tol=SAME)]
    return winners[0] if len(winners) == 1 < len(values) else None


def _not_comparable(subjects: Sequence[Subject], metric: str) -> str | None:
    """Why validation values are not comparable between runs; None if their recipes agree."""
    recipes = [subject.recipe for subject in subjects if subject.recipe is not None]
    keys = [*VALIDATION_KEYS, *(("loss.perceptual.net",) if metric == "perceptual" else ())]
    if any(recipe.get("data.validation") == "auto" for recipe in recipes):
        keys += ["data.shards", "data.validation_fraction"]
    different = [key for key in keys if len({repr(recipe.get(key)) for recipe in recipes}) > 1]
    return f"the runs differ in {', '.join(different)}" if different else None


def _evaluations(evaluated: Sequence[Subject]) -> dict[str, Any]:
    """Metrics by subject, and the best subject if all evaluations use the same images."""
    results = {subject.name: subject.evaluation for subject in evaluated if subject.evaluation is not None}
    reasons = itertools.starmap(_other_images, itertools.combinations(results.values(), 2))
    reason, metrics = next(filter(None, reasons), None), {}
    for metric in dict.fromkeys(metric for result in results.values() for metric in result["metrics"]):
        measured = {name: result for name, result in results.items() if metric in result["metrics"]}
        values = {name: result["metrics"][metric] for name, result in measured.items()}
        label, *others = {metric_label(metric, result) for result in measured.values()}
        if others:
            label = f"perceptual distance {'↑' if HIGHER_IS_BETTER[metric] else '↓'}"
        means = {name: interval["mean"] for name, interval in values.items() if interval["mean"] is not None}
        best = None if reason or others else _winner(means, HIGHER_IS_BETTER[metric])
        metrics[metric] = {"label": label, "values": values, "best": best}
    distances: dict[str, dict[str, float]] = {}  # by extractor, then by subject
    for name, result in results.items():
        found = result.get("frechet") or {}
        value = found.get("values", {}).get("model")
        if value is not None:
            distances.setdefault(found["name"], {})[name] = value
    frechet = {
        extractor: {"values": values, "best": None if reason else _winner(values, higher=False)}
        for extractor, values in distances.items()
    }
    return {"metrics": metrics, "reason": reason, "frechet": frechet}


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
        first, second = (_scores([subject.rows[key] for key in keys]) for subject in (a, b))
        if metric_label("perceptual", a.evaluation) != metric_label("perceptual", b.evaluation):
            first.values.pop("perceptual", None)
        names = {"model": b.name, "baseline": a.name}
        differences = {
            metric: {**difference, "better": names.get(difference["better"])}
            for metric, difference in paired(second, first, SEED).items()
        }
        yield {**pair, "images": len(keys), "metrics": differences}


def _scores(rows: Sequence[Mapping[str, float]]) -> Scores:
    metrics = [metric for metric in HIGHER_IS_BETTER if all(metric in row for row in rows)]
    return Scores({metric: [row[metric] for row in rows] for metric in metrics})


def _print(result: Mapping[str, Any]) -> None:
    """Print the numbers as a table, the best in bold, and the recipe keys that differ."""
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
    seen = {item["name"]: f"{item['images']:,}" for item in result["subjects"] if item["images"] is not None}
    yield "images seen", seen, None
    for item in result["validation"]:
        bests = {name: (value["best"], value["best_images"]) for name, value in item["values"].items()}
        texts = {name: f"{best:.4g} at {images:,.0f}" for name, (best, images) in bests.items()}
        yield f"held-out {item['metric']}, best", texts, item["best"]
    speeds = {name: f"{speed['images_per_second']:.3g}" for name, speed in result["training"].items()}
    if speeds:
        yield "images a second", speeds, None
    for metric, item in result["evaluation"]["metrics"].items():
        pairs = {name: interval_text(metric, interval) for name, interval in item["values"].items()}
        yield item["label"], {name: f"{mean} ({low})" for name, (mean, low) in pairs.items()}, item["best"]
    for extractor, item in result["evaluation"]["frechet"].items():
        yield f"{extractor} ↓", {name: f"{value:.4g}" for name, value in item["values"].items()}, item["best"]
