"""The page of one run: what was trained, how good it became, every curve, what happened, and the recipe; it opens offline."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentae.errors import LatentAEError, TrainingError
from latentae.file_names import BAD_SAMPLES, EVENTS_LOG, METRICS_LOG, RECIPE, RECORD, SUMMARY
from latentae.files import read_json, write_text
from latentae.measures.scores import DIGITS, HIGHER_IS_BETTER
from latentae.pages.curves import Series, chart, read_log
from latentae.pages.pictures import read_png
from latentae.pages.report import (
    Block,
    Chart,
    Charts,
    Code,
    Facts,
    Links,
    Notices,
    Paragraph,
    Picture,
    Section,
    Strip,
    Tiles,
    build_report,
)
from latentae.progress import duration
from latentae.training.recipe import Recipe, load_recipe
from latentae.training.reporting import read_lines

__all__ = ["write_summary"]

SAMPLES = "samples"
EVENTS_SHOWN = 60
START = "start"  # the kind of event that says where a run begins or goes on; the others are trouble
NOT_CURVES = ("step", "images", "time", "phase")
TITLES = {
    "lr": "Learning rate",
    "img_per_s": "Images a second",
    "data_wait": "Share of the time spent waiting for data",
    "memory_gb": "Peak memory (GB)",
    "bad_samples": "Images that could not be read",
    "skipped_steps": "Steps left out",
    "adversarial/ratio": "Adaptive ratio: adversarial",
    "alignment/ratio": "Adaptive ratio: alignment",
    "validation/psnr": "PSNR (dB)",
    "validation/ssim": "SSIM",
    "validation/perceptual": "Perceptual distance",
    "loss/kl": "KL",
}
SHARES = ("data_wait", "validation/ssim")
PAIRS = {
    "discriminator/logits": "Logits",
    "discriminator/accuracy": "Share judged rightly",
}  # each of real and fake


def write_summary(run: str | Path) -> Path:
    """Write `RUN/summary.html` from what a run, finished or not, has left in its folder.

    Returns:
        The page.

    Raises:
        TrainingError: the folder holds no run.
        OutputError: the page can't be written.
    """
    run = Path(run)
    if not (run / RECIPE).is_file() and not (run / METRICS_LOG).is_file():
        raise TrainingError(
            f"{run} holds no run (neither {RECIPE} nor {METRICS_LOG}); give the folder that `latentae train` made"
        )
    left = _Left.of(run)
    sections = [Section("At a glance", [_tiles(left), Notices(list(_findings(left)))])]
    pictures = _pictures(run)
    if pictures:
        caption = "Held-out images above, their reconstructions by the averaged weights below."
        sections.append(Section("Pictures", [*pictures, Paragraph(caption)]))
    sections += _curves(left)
    sections.append(Section("What happened", _events(left.events)))
    sections.append(Section("What was trained", [Facts(_facts(left))]))
    if left.text:
        sections.append(Section("The recipe", [Code(left.text)], folded=True))
    sections.append(
        Section("Files", [Links([(label, name) for label, name in _files() if (run / name).exists()])])
    )
    subtitle = f"{left.recipe.description} {left.state}" if left.recipe else left.state
    footer = f"Made by latentae {left.record.get('latentae', '')}. This page needs no network; keep it in its folder for links to work."
    page = build_report(f"Training of {run.resolve().name}", subtitle, sections, footer)
    write_text(run / SUMMARY, page)
    return run / SUMMARY


@dataclass(frozen=True)
class _Left:
    """What a run has left: nothing of it is sure to be there."""

    record: Mapping[str, Any]
    text: str
    recipe: Recipe | None
    lines: Sequence[Mapping[str, Any]]
    series: Mapping[str, Series]
    events: Sequence[Mapping[str, Any]]
    bad_samples: int = 0
    phases: Sequence[Recipe] = field(default_factory=tuple)

    @classmethod
    def of(cls, run: Path) -> _Left:
        record, text, recipe, phases = {}, "", None, ()
        with suppress(OSError, ValueError):
            record = read_json(run / RECORD)
        with suppress(OSError):
            text = (run / RECIPE).read_text(encoding="utf-8")
        with suppress(LatentAEError):  # of another version, perhaps
            recipe = load_recipe(run / RECIPE)
            phases = recipe.phase_recipes()
        log, bad = run / METRICS_LOG, run / BAD_SAMPLES
        series = read_log(log, ("",)) if log.is_file() else {}
        bad_samples = bad.read_bytes().count(b"\n") if bad.is_file() else 0
        return cls(
            record, text, recipe, read_lines(log), series, read_lines(run / EVENTS_LOG), bad_samples, phases
        )

    @property
    def images(self) -> int:
        """Images seen at the last line."""
        return max((line["images"] for line in self.lines), default=0)

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        total = self.recipe.images if self.recipe else 0
        if self.record.get("finished"):
            return f"Finished after {self.images:,} images."
        return (
            f"Not finished: {self.images:,} of {total:,} images seen."
            if total
            else f"{self.images:,} images seen."
        )


def _tiles(left: _Left) -> Tiles:
    tiles = []
    for metric, higher in HIGHER_IS_BETTER.items():
        series = left.series.get(f"validation/{metric}")
        if series:
            digits, (_, last) = DIGITS[metric], series[-1]
            at, best = (max if higher else min)(series, key=lambda point: point[1])
            note = "the best so far" if best == last else f"best {best:.{digits}f} at {at:,.0f} images"
            tiles.append(
                (f"{TITLES[f'validation/{metric}']} {'↑' if higher else '↓'}", f"{last:.{digits}f}", note)
            )
    total = f"of {left.recipe.images:,}" if left.recipe else ""
    tiles.append(("images seen", f"{left.images:,}", total))
    trained, _ = _seconds(left.lines)
    if trained:
        speeds = sorted(value for _, value in left.series["img_per_s"])
        tiles.append(("training", duration(trained), f"{speeds[len(speeds) // 2]:.3g} images a second"))
    return Tiles(tiles)


def _seconds(lines: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds of training by the reported speeds (without stops, validation and checkpoints), and of the clock."""
    reports = [
        line for line in lines if isinstance(line.get("img_per_s"), int | float) and line["img_per_s"] > 0
    ]
    before = [0, *(line["images"] for line in reports)]
    trained = sum(
        (line["images"] - seen) / line["img_per_s"] for seen, line in zip(before, reports, strict=False)
    )
    times = [line["time"] for line in lines if isinstance(line.get("time"), int | float)]
    return trained, max(times) - min(times) if times else 0.0


def _findings(left: _Left) -> Iterator[tuple[str, str]]:
    """What a reader must not overlook."""
    if not left.record.get("finished"):
        yield "note", "The run has not finished; the same command goes on from its last checkpoint."
    counts = Counter(str(event.get("kind")) for event in left.events if event.get("kind") != START)
    if counts:
        yield (
            "bad",
            "Trouble on the way: "
            + ", ".join(f"{count} {kind}" for kind, count in counts.items())
            + "; see below.",
        )
    if left.bad_samples:
        yield (
            "bad",
            f"{left.bad_samples:,} samples could not be read and were replaced; {BAD_SAMPLES} lists them.",
        )
    if not counts and not left.bad_samples:
        yield "good", "No warnings, no steps left out, every sample readable."
    if not any(name.startswith("validation/") for name in left.series):
        yield (
            "note",
            "Nothing was measured on held-out images: the recipe names none, or the run ended before.",
        )


def _pictures(run: Path) -> list[Block]:
    """The last grid and the first."""
    files = sorted((run / SAMPLES).glob("*.png"))
    blocks: list[Block] = []
    for file in files[-1:] + (files[:1] if len(files) > 1 else []):
        when = "Last" if file == files[-1] else "First"
        with suppress(OSError):  # no image any more
            blocks.append(
                Strip(
                    Picture(
                        read_png(file),
                        when,
                        f"after {int(file.stem):,} images" if file.stem.isdigit() else "",
                    )
                )
            )
    return blocks


def _curves(left: _Left) -> list[Section]:
    """A section for each family of curves that has any; what no family knows comes last."""
    names = [name for name in left.series if name not in NOT_CURVES]
    families = {
        "Held-out quality": [name for name in names if name.startswith("validation/")],
        "Losses": sorted(
            (name for name in names if name.startswith("loss/")),
            key=lambda name: (name != "loss/total", name),
        ),
        "Discriminator": [name for name in names if name.startswith("discriminator/")],
        "Steps": [name for name in ("lr", "adversarial/ratio", "alignment/ratio") if name in names]
        + sorted(name for name in names if name.startswith("gradient_norm/")),
        "Machine": [name for name in ("img_per_s", "data_wait", "memory_gb") if name in names],
    }
    known = set(itertools.chain(*families.values()))
    rest = [name for name in names if name not in known]
    families["Other"] = [name for name in rest if any(value for _, value in left.series[name])]
    marks, meaning = _marks(left.phases, left.images)
    captions = itertools.chain(
        ["Faint: every logged value; strong: running mean." + (f" Dashed: {meaning}." if meaning else "")],
        itertools.repeat(""),
    )
    return [
        Section(family, [Charts(list(_charts(left.series, members, marks)), next(captions))])
        for family, members in families.items()
        if members
    ]


def _charts(
    series: Mapping[str, Series], names: Sequence[str], marks: Sequence[tuple[float, str]]
) -> Iterator[Chart]:
    done: set[str] = set()
    for name in names:
        pair = name.removesuffix("_real").removesuffix("_fake")
        if pair not in PAIRS:
            yield Chart(chart({"": series[name]}, name, marks, linear=name in SHARES), _title(name))
        elif pair not in done:
            done.add(pair)
            both = {end: series[f"{pair}_{end}"] for end in ("real", "fake") if f"{pair}_{end}" in series}
            yield Chart(chart(both, pair, marks), PAIRS[pair])


def _title(name: str) -> str:
    kind, _, rest = name.rpartition("/")
    words = f"gradient norm: {rest}" if kind == "gradient_norm" else rest
    words = words.replace("_", " ")
    return TITLES.get(name, words[:1].upper() + words[1:])


def _marks(phases: Sequence[Recipe], images: int) -> tuple[list[tuple[float, str]], str]:
    """Where phases began ("1", "2", ... after phase 0) and the discriminator ("D"), and what the letters mean."""
    marks, begin = [], 0
    for index, phase in enumerate(phases):
        start = phase.loss.adversarial.start_images
        if index:
            marks.append((float(begin), str(index), f"{phase.description} begins"))
        if phase.loss.adversarial.weight and 0 < start < phase.images:
            marks.append((float(begin + start), "D", "the discriminator begins to play"))
        begin += phase.images
    passed = [mark for mark in marks if mark[0] <= images]
    meanings = dict.fromkeys(f"{text}, {meaning}" for _, text, meaning in passed)
    return [(at, text) for at, text, _ in passed], "; ".join(meanings)


def _events(events: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not events:
        return [Paragraph("Nothing out of the ordinary.")]
    shown = events[-EVENTS_SHOWN:]
    notices = [
        (
            "note" if event.get("kind") == START else "bad",
            f"{event.get('kind', 'event')} at image {event['images']:,}: {event.get('message', '')}",
        )
        for event in shown
    ]
    more = f"The last {len(shown)} of {len(events):,}; {EVENTS_LOG} has them all."
    return [Notices(notices), *([Paragraph(more)] if len(shown) < len(events) else [])]


def _facts(left: _Left) -> list[tuple[str, str]]:
    starts = [str(event.get("message", "")) for event in left.events if event.get("kind") == START]
    facts = [("run on", "; ".join(dict.fromkeys(starts))), ("starts", str(len(starts)))] if starts else []
    trained, wall = _seconds(left.lines)
    if trained:
        facts.append(
            ("time", f"{duration(trained)} of training; {duration(wall)} from the first report to the last")
        )
    recipe = left.recipe
    if recipe is None:
        return [*facts, ("recipe", f"{RECIPE} is missing or of another version")]
    data, named = recipe.data, enumerate(left.phases if recipe.phases else ())
    return [
        *_model_facts(recipe),
        ("training images", f"{data.shards}, {data.resolution} px"),
        ("held-out images", data.validation),
        ("images", f"{recipe.images:,}" + (f" in {len(left.phases)} phases" if recipe.phases else "")),
        *((f"phase {index}", f"{phase.description}: {phase.images:,} images") for index, phase in named),
        ("batch", f"{recipe.batch_size} images"),
        ("learning rate", f"{recipe.optimizer.lr:g}, {recipe.optimizer.schedule}"),
        ("seed", str(recipe.seed)),
        *facts,
    ]


def _model_facts(recipe: Recipe) -> list[tuple[str, str]]:
    """Shape and size, where the model's own files can still be found."""
    import torch

    from latentae.models.architectures import build

    try:
        config = recipe.autoencoder_config()
    except LatentAEError:
        return [("model", f"{recipe.model.preset} from {recipe.model.init_from}")]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in build(config).parameters())
    shape = f"f{config.downsampling}, {config.latent_channels} latent channels, {size / 1e6:.2f} M parameters"
    begun = [("begun with", recipe.model.init_from)] if recipe.model.init_from else []
    return [("model", f"{recipe.model.preset}: {shape}"), *begun]


def _files() -> list[tuple[str, str]]:
    return [
        (f"all numbers ({METRICS_LOG})", METRICS_LOG),
        (f"what happened ({EVENTS_LOG})", EVENTS_LOG),
        (f"samples that could not be read ({BAD_SAMPLES})", BAD_SAMPLES),
        (f"the recipe as it ran ({RECIPE})", RECIPE),
        (f"every grid of held-out images ({SAMPLES})", SAMPLES),
        ("checkpoints", "checkpoints"),
    ]
