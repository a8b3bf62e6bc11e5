"""The page of one run, finished or not: quality, curves, events, settings and recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from latentae.errors import LatentAEError, TrainingError
from latentae.file_names import BAD_SAMPLES, EVENTS_LOG, METRICS_LOG, RECIPE, RECORD, SUMMARY
from latentae.files import read_json, write_text
from latentae.measures.scores import DIGITS, HIGHER_IS_BETTER
from latentae.pages.charts import Chart
from latentae.pages.curves import Series, curve_chart, curve_title, read_log, run_speed
from latentae.pages.images import picture, read_png
from latentae.pages.render import render
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.reporting import read_lines

__all__ = ["write_summary"]

START = "start"  # type of the event that a start or resume writes; all other events are problems
MOST_EVENTS = 60  # on the page
FILES = {  # in the run folder -> label
    METRICS_LOG: f"all numbers ({METRICS_LOG})",
    EVENTS_LOG: f"all events ({EVENTS_LOG})",
    BAD_SAMPLES: f"unreadable samples ({BAD_SAMPLES})",
    RECIPE: f"the resolved recipe ({RECIPE})",
    "samples": "every grid of held-out images (samples)",
    "checkpoints": "checkpoints",
}
CURVES = {  # title of a section -> names of its curves, or the prefix that they share
    "Held-out quality": ("validation/"),
    "Losses": ("loss/total", "loss/"),
    "Discriminator": ("discriminator/",),
    "Steps": ("lr", "adversarial/ratio", "alignment/ratio", "gradient_norm/"),
    "Machine": ("img_per_s", "data_wait", "memory_gb"),
}
NOT_CURVES = ("step", "images", "time", "phase")


def write_summary(run: str | Path) -> Path:
    """Write `RUN/summary.html` from the files of a run, finished or not.

    Returns:
        The page.

    Raises:
        TrainingError: the folder holds no run.
        OutputError: the page can't be written.
    """
    run = Path(run)
    if not (run / RECIPE).is_file() and not (run / METRICS_LOG).is_file():
        raise TrainingError(
            f"{run} holds no run (neither {RECIPE} nor {METRICS_LOG}); give an output of `latentae train`"
        )
    write_text(run / SUMMARY, render("training_summary.html", **_context(run)))
    return run / SUMMARY


def _context(run: Path) -> dict[str, Any]:
    """Read the files of a run; any of them may be missing or damaged."""
    record, recipe_text, recipe, phases = {}, "", None, ()
    with suppress(OSError, ValueError):
        record = read_json(run / RECORD)
    with suppress(OSError):
        recipe_text = (run / RECIPE).read_text(encoding="utf-8")
    with suppress(LatentAEError):  # perhaps of another version
        recipe = load_recipe(run / RECIPE)
        phases = recipe.phase_recipes()
    series = read_log(run / METRICS_LOG) if (run / METRICS_LOG).is_file() else {}
    images = int(series["images"][-1][1]) if "images" in series else 0
    events = read_lines(run / EVENTS_LOG)
    bad_samples = (run / BAD_SAMPLES).read_bytes().count(b"\n") if (run / BAD_SAMPLES).is_file() else 0
    marks = [mark for mark in _marks(phases) if mark[0] <= images]
    return {
        "name": run.resolve().name,
        "record": record,
        "recipe": recipe,
        "recipe_text": recipe_text,
        "phases": phases,
        "model": None if recipe is None else _model(recipe),
        "images": images,
        "quality": list(_quality(series)),
        "speed": run_speed(series),
        "problems": Counter(str(event.get("kind")) for event in events if event.get("kind") != START),
        "bad_samples": bad_samples,
        "validated": any(name.startswith("validation/") for name in series),
        "pictures": list(_pictures(run)),
        "curves": _curves(series, [(at, text) for at, text, _ in marks]),
        "marks": list(dict.fromkeys(f"{text}, {meaning}" for _, text, meaning in marks)),
        "events": events[-MOST_EVENTS:],
        "event_count": len(events),
        "starts": [str(event.get("message", "")) for event in events if event.get("kind") == START],
        "files": {file: label for file, label in FILES.items() if (run / file).exists()},
    }


def _model(recipe: Recipe) -> str:
    """Shape and size, as far as the files that the recipe names still exist."""
    import torch

    from latentae.models.config import build

    try:
        config = recipe.autoencoder_config()
    except LatentAEError:
        return f"{recipe.model.preset} from {recipe.model.init_from}"
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    shape = f"f{config.downsampling}, {config.latent_channels} latent channels"
    return f"{recipe.model.preset}: {shape}, {size / 1e6:.2f} M parameters"


def _quality(series: Mapping[str, Series]) -> Iterator[tuple[str, str, str]]:
    """Label, last value and note of each metric measured on held-out images."""
    for metric, higher in HIGHER_IS_BETTER.items():
        points, digits = series.get(f"validation/{metric}"), DIGITS[metric]
        if points:
            last = points[-1][1]
            at, best = (max if higher else min)(points, key=lambda point: point[1])
            note = "the best so far" if best == last else f"best {best:.{digits}f} at {at:,.0f} images"
            title = f"{curve_title(f'validation/{metric}')} {'↑' if higher else '↓'}"
            yield title, f"{last:.{digits}f}", note


def _pictures(run: Path) -> Iterator[dict[str, Any]]:
    """The last grid of held-out images and the first."""
    files = sorted((run / "samples").glob("*.png"))
    for label, file in zip(("Last", "First"), [*files[-1:], *files[:-1][:1]], strict=False):
        seen = f"after {int(file.stem):,} images" if file.stem.isdigit() else ""
        with suppress(OSError):  # damaged
            yield picture(read_png(file), label, seen)


def _curves(
    series: Mapping[str, Series], marks: Sequence[tuple[float, str]]
) -> dict[str, list[tuple[str, Chart]]]:
    """Title of a section -> titles and charts. Other curves, unless all 0, come last."""
    rest = [name for name in series if name not in NOT_CURVES]
    sections: dict[str, list[tuple[str, Chart]]] = {}
    for title, patterns in CURVES.items():
        members = [
            name
            for pattern in patterns
            for name in rest
            if name == pattern
            or (pattern.endswith("/") and name.startswith(pattern) and name not in patterns)
        ]
        rest = [name for name in rest if name not in members]
        sections[title] = _charts(series, members, marks)
    others = [name for name in rest if any(value for _, value in series[name])]
    return {**sections, "Other": _charts(series, others, marks)}


def _charts(
    series: Mapping[str, Series], names: Sequence[str], marks: Sequence[tuple[float, str]]
) -> list[tuple[str, Chart]]:
    """Titles and charts; values for real and fake images share one."""
    lines: dict[str, dict[str, Series]] = {}
    for name in names:
        base, _, end = name.rpartition("_")
        base, end = (base, end) if end in ("real", "fake") else (name, "")
        lines.setdefault(base, {})[end] = series[name]
    return [(curve_title(name), curve_chart(curves, name, marks)) for name, curves in lines.items()]


def _marks(phases: Sequence[Recipe]) -> Iterator[tuple[float, str, str]]:
    """(images seen, short text, meaning) of each start of a phase and of the adversarial loss."""
    begin = 0
    for index, phase in enumerate(phases):
        start = phase.loss.adversarial.start_images
        if index:
            yield float(begin), str(index), f"{phase.description} begins"
        if phase.loss.adversarial.weight and 0 < start < phase.images:
            yield float(begin + start), "D", "the adversarial loss starts"
        begin += phase.images
