"""The page of the quickstart: start from PCA, evaluation, check in diffusers, commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.data.builtin import HELD_OUT, TRAINING
from latentae.evaluation.report import evaluation_context, example_pictures
from latentae.examples.diffusers_check import DiffusersCheck
from latentae.file_names import METRICS_LOG, REPORT
from latentae.files import write_text
from latentae.measures.scores import interval_text
from latentae.pages.images import picture, write_png
from latentae.pages.render import render
from latentae.training.recipe import Recipe

__all__ = ["write_quickstart_page"]

PROGRESS_IMAGES = 4  # rows of pictures from PCA to the trained model


def write_quickstart_page(
    out: Path, result: Mapping[str, Any], check: DiffusersCheck, recipe: Recipe, laps: Mapping[str, float]
) -> None:
    """Write `out`/report.html and the image that diffusers decoded."""
    write_png(out / "decoded-by-diffusers.png", check.decoded)
    config, evaluation = recipe.autoencoder_config(), out / "evaluation"
    (start,) = result["compared"]
    stages = {"pca": result["baselines"]["pca"], start["name"]: start, "model": result}
    labels = {"original": "original", "pca": "PCA", start["name"]: "step 0", "model": "trained"}
    examples = [e for e in result.get("examples") or () if e.get("kind", "spread") == "spread"]
    page = render(
        "quickstart.html",
        **evaluation_context(evaluation, result, out / "run" / METRICS_LOG),
        recipe=recipe,
        config=config,
        stages={
            labels[name]: [interval_text(metric, entry["metrics"][metric]) for metric in result["metrics"]]
            for name, entry in stages.items()
            if "metrics" in entry
        },
        progress=[example_pictures(evaluation, example, labels) for example in examples[:PROGRESS_IMAGES]],
        check=check,
        decoded=picture(check.decoded, "decoded by diffusers", "a training tile, from its stored latent"),
        training_photos=_names(TRAINING),
        held_out_photos=_names(HELD_OUT),
        laps=laps,
    )
    write_text(out / REPORT, page)


def _names(files: Sequence[str]) -> list[str]:
    return [name.partition(".")[0].replace("_", " ") for name in files]
