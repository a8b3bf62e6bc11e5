"""The report of the quickstart: the whole line on one page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentae.data.builtin import HELD_OUT, TRAINING
from latentae.evaluation.evaluation_page import detail_sections, evaluation_sections, training_sections
from latentae.examples.diffusers_check import DiffusersCheck
from latentae.file_names import METRICS_LOG, REPORT
from latentae.files import write_text
from latentae.measures.scores import interval_text, metric_label
from latentae.pages.images import write_png
from latentae.pages.pictures import example_row
from latentae.pages.report import (
    Code,
    DataTable,
    Facts,
    Gallery,
    GalleryRow,
    Links,
    Paragraph,
    Picture,
    Section,
    build_report,
)
from latentae.training.recipe import Recipe
from latentae.version import __version__

__all__ = ["write_quickstart_page"]

SNIPPET = """import torch
from diffusers import AutoencoderDC

vae = AutoencoderDC.from_pretrained("export")          # no latentae needed
images = torch.rand(1, 3, 128, 128) * 2 - 1            # [-1, 1]
latents = vae.encode(images).latent * vae.config.scaling_factor
decoded = vae.decode(latents / vae.config.scaling_factor).sample"""
STORY_ROWS = 4


def write_quickstart_page(
    out: Path, result: Mapping[str, Any], check: DiffusersCheck, recipe: Recipe, laps: Mapping[str, float]
) -> None:
    """Write `out`/report.html and the picture that diffusers decoded."""
    write_png(out / "decoded-by-diffusers.png", check.decoded)
    evaluation = out / "evaluation"
    sections = [
        _story_section(evaluation, result, recipe.autoencoder_config().downsampling),
        *evaluation_sections(evaluation, result),
        *training_sections(out / "run" / METRICS_LOG),
        _diffusers_section(check),
        _line_section(recipe, laps),
        *detail_sections(result),
        Section("Files", [Links(_links())]),
    ]
    subtitle = (
        f"An f{recipe.autoencoder_config().downsampling} autoencoder with {recipe.autoencoder_config().latent_channels} latent channels, "
        f"trained on {recipe.images:,} crops of {len(TRAINING)} photos, judged on {len(HELD_OUT)} others"
    )
    footer = f"Made by latentae {__version__}. This page needs no network; keep it beside its folders for the links to work."
    write_text(out / REPORT, build_report("From photos to a diffusers component", subtitle, sections, footer))


def _story_section(evaluation: Path, result: Mapping[str, Any], factor: int) -> Section:
    """PCA, the model before its first step, and the model at the end: figures and pictures."""
    (start,) = result["compared"]
    tellers = [
        ("pca", "PCA", result["baselines"]["pca"]),
        (start["name"], "step 0", start),
        ("model", "the end", result),
    ]
    metrics = list(result["metrics"])
    rows = [
        [(label, ""), *(interval_text(metric, entry["metrics"][metric]) for metric in metrics)]
        for _, label, entry in tellers
        if "metrics" in entry
    ]
    components, size = result["latent"]["shape"][0], f"{factor} x {factor}"
    text = (
        f"The training did not begin at random weights. Principal components of {size} pixels of the "
        f"training photos, {components} of them, are the best a linear codec can do with so many numbers; the weights of an "
        "ordinary AutoencoderDC were set so that it is that codec before its first step. What it learned from there, it learned on top."
    )
    table = DataTable(
        ["", *(metric_label(metric, result) for metric in metrics)],
        rows,
        caption="Means over the held-out tiles.",
        strong=frozenset({len(rows) - 1}),
    )
    examples = [e for e in result.get("examples") or () if e.get("kind", "spread") == "spread"][:STORY_ROWS]
    labels = {"original": "original"} | {name: label for name, label, _ in tellers}
    rows_of_pictures = [example_row(evaluation, example, [*labels], labels) for example in examples]
    return Section("From PCA to the end", [Paragraph(text), table, Gallery(rows_of_pictures)])


def _diffusers_section(check: DiffusersCheck) -> Section:
    text = (
        f"Plain diffusers {check.version} loaded the folder export/ and reconstructed {check.images} held-out images as latentae does; "
        f"the largest difference of any value is {check.largest_difference:.1e} (the range is [-1, 1]). Below: a latent stored by "
        "`latentae encode`, decoded by diffusers."
    )
    row = GalleryRow(
        check.key, [Picture(check.decoded, "decoded by diffusers", "a training tile, from its stored latent")]
    )
    return Section("In diffusers", [Paragraph(text), Gallery([row]), Code(SNIPPET)])


def _line_section(recipe: Recipe, laps: Mapping[str, float]) -> Section:
    text = (
        f"Training photos: {_names(TRAINING)}. Held out, never seen in training: {_names(HELD_OUT)}. With this few photos every number "
        "here says more about the line working than about what the architecture can do; train longer and on more data for that."
    )
    facts = [(name, f"{seconds:.0f} s") for name, seconds in laps.items()]
    commands = (
        "latentae shards photos/training training-shards\n"
        "latentae init dc-tiny training-shards step-0 --data.validation held-out-shards\n"
        "latentae train dc-tiny --data.shards training-shards --data.validation held-out-shards "
        f"--images {recipe.images} --output run\n"
        "latentae evaluate run held-out-shards --compare step-0 --resolution 128 --pca-shards training-shards --out evaluation\n"
        "latentae encode run training-shards latents --resolution 128\n"
        "latentae export run export --statistics latents --metrics evaluation\n"
        "latentae reconstruct run my-photo.jpg --out grid.png"
    )
    return Section("The line, step by step", [Paragraph(text), Code(commands), Facts(facts)])


def _names(files: tuple[str, ...]) -> str:
    return ", ".join(name.partition(".")[0].replace("_", " ") for name in files)


def _links() -> list[tuple[str, str]]:
    return [
        ("the component (export/)", "export/README.md"),
        ("held-out numbers (evaluation/metrics.json)", "evaluation/metrics.json"),
        ("one row per image (evaluation/per_image.csv)", "evaluation/per_image.csv"),
        ("statistics of the latents (latents/statistics.json)", "latents/statistics.json"),
        ("log of the training (run/metrics.jsonl)", "run/metrics.jsonl"),
        ("the recipe as it ran (run/recipe.toml)", "run/recipe.toml"),
    ]
