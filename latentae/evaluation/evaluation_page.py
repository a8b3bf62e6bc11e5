"""The page of one evaluation, in sections that other reports (the quickstart's) can put into theirs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentae.evaluation.curves import training_charts
from latentae.evaluation.report import (
    Block,
    Charts,
    DataTable,
    Facts,
    Gallery,
    GalleryRow,
    Links,
    Notices,
    Paragraph,
    Picture,
    Section,
    Tiles,
    build_report,
)
from latentae.evaluation.summary import HIGHER_IS_BETTER, interval_text, methods, metric_label
from latentae.files import write_text

__all__ = ["detail_sections", "evaluation_sections", "read_png", "training_sections", "write_evaluation_report"]

SHORT_NAMES = {  # in the order shown
    "original": "original",
    "model": "this model",
    "pca": "PCA, same floats",
    "jpeg": "JPEG, same bytes",
}


def write_evaluation_report(folder: str | Path, result: Mapping[str, Any], metrics_log: str | Path | None = None) -> None:
    """Write `folder`/report.html from an evaluation's result and the example pictures in `folder`."""
    data = result["data"]
    name, side = Path(result["model"]["path"]).name, data["resolution"]
    subtitle = f"{name} on {_count(data['images'], 'image')} at {side} x {side} pixels"
    files = Links([("all numbers (metrics.json)", "metrics.json"), ("one row per image (per_image.csv)", "per_image.csv")])
    sections = [
        *evaluation_sections(folder, result),
        *training_sections(metrics_log),
        *detail_sections(result),
        Section("Files", [files]),
    ]
    footer = f"Made by latentae {result['latentae']}. This page needs no network; keep it beside its files for the links to work."
    write_text(Path(folder) / "report.html", build_report("How good is this autoencoder?", subtitle, sections, footer))


def evaluation_sections(folder: str | Path, result: Mapping[str, Any]) -> list[Section]:
    """Headline numbers with what they mean, pictures, and the table of methods.

    Args:
        folder: where `evaluate` wrote its example pictures.
        result: what `evaluate` returned, or its metrics.json.
    """
    sections = [Section("At a glance", [_tiles(result), Notices([(item["kind"], item["text"]) for item in result["findings"]])])]
    if result.get("examples"):
        sections.append(Section("Pictures", [_gallery(Path(folder), result)]))
    return [*sections, Section("Against baselines", [_table(result)])]


def training_sections(metrics_log: str | Path | None) -> list[Section]:
    """Loss and validation curves of a run; none without a log or with an empty one."""
    charts = training_charts(metrics_log) if metrics_log is not None and Path(metrics_log).is_file() else []
    caption = "Faint: every logged value; strong: running mean. Validation is measured on held-out images."
    return [Section("Training", [Charts(charts, caption)])] if charts else []


def detail_sections(result: Mapping[str, Any]) -> list[Section]:
    """Latent statistics, conventions, model and versions."""
    model, data = result["model"], result["data"]
    facts = [
        ("model", model["path"]),
        ("kind, weights", f"{model['kind']}, {model['weights']}"),
        ("parameters", f"{model['parameters']:,}"),
        ("fingerprint", model["fingerprint"]),
        ("shards", ", ".join(data["shards"][:4]) + (f" and {len(data['shards']) - 4} more" if len(data["shards"]) > 4 else "")),
        ("images", f"{data['images']:,} of {data['available']:,}"),
        *result["environment"].items(),
    ]
    return [
        Section("The latent space", _latent_blocks(result["latent"])),
        Section("How it was measured", [Facts(list(result["conventions"].items()))]),
        Section("What was measured, and with what", [Facts(facts)]),
    ]


def _tiles(result: Mapping[str, Any]) -> Tiles:
    tiles = []
    for metric, interval in result["metrics"].items():
        mean, range_ = interval_text(metric, interval)
        tiles.append((metric_label(metric, result), mean, f"95 %: {range_}" if interval["mean"] is not None else range_))
    latent = result["latent"]
    size = result["baselines"]["latent_8bit"]
    shape = " x ".join(str(side) for side in latent["shape"])
    tiles.append(("latent", shape, f"{latent['image_numbers_per_latent_number']:.3g} times fewer numbers than the image"))
    tiles.append(
        ("as bytes", f"{size['bytes_per_image']:,.0f}", f"8 bits and deflate: {size['bits_per_pixel']:.2f} bits a pixel")
    )
    return Tiles(tiles)


def _gallery(folder: Path, result: Mapping[str, Any]) -> Gallery:
    rows = []
    for example in result["examples"]:
        pictures = []
        for method, name in SHORT_NAMES.items():
            if method in example["files"]:
                value = example["psnr"].get(method)
                detail = "" if method == "original" else "identical" if value is None else f"{value:.2f} dB"
                pictures.append(Picture(read_png(folder / example["files"][method]), name, detail))
        rows.append(GalleryRow(example["key"], pictures))
    caption = (
        "Evenly spaced over the images, not picked. PSNR of each image under it. PCA keeps as many numbers as the latent; "
        "JPEG takes at most the bytes of the 8-bit latent."
    )
    return Gallery(rows, caption)


def _table(result: Mapping[str, Any]) -> DataTable:
    metrics, rows, best = list(result["metrics"]), [], set()
    entries = methods(result)
    for column, metric in enumerate(metrics, start=1):
        means = {number: entry["metrics"][metric]["mean"] for number, entry in enumerate(entries)}
        numbers = {number: mean for number, mean in means.items() if mean is not None}
        if numbers:
            best.add(((max if HIGHER_IS_BETTER[metric] else min)(numbers, key=lambda n: numbers[n]), column))
    for entry in entries:
        size = entry.get("bytes_per_image")
        small = f"{entry['components']} components, {entry['patches']:,} patches" if "components" in entry else ""
        cells = [interval_text(metric, entry["metrics"][metric]) for metric in metrics]
        rows.append([(entry["label"], small), *cells, ("-" if size is None else f"{size:,.0f}", "")])
    header = ["method", *(metric_label(metric, result) for metric in metrics), "bytes / image"]
    return DataTable(
        header, rows, frozenset(best), "Mean over images and its 95 % bootstrap interval; the best mean of a column stands out."
    )


def _latent_blocks(latent: Mapping[str, Any]) -> list[Block]:
    scale = latent["scaling_factor"]
    facts = [
        ("shape", " x ".join(str(side) for side in latent["shape"])),
        ("numbers per pixel", f"{latent['floats_per_pixel']:.4g}"),
        ("suggested scaling_factor", "none: the latent is constant" if scale is None else f"{scale:.5g}"),
        ("suggested shift_factor", f"{latent['shift_factor']:.5g}"),
        ("mean and std, all channels", f"{latent['mean']:.4g} and {latent['std']:.4g}"),
        ("KL to a standard normal", f"{latent['kl_nats_per_image']:.4g} nats an image"),
        ("largest |posterior mean|", f"{latent['largest_absolute_mean']:.4g}"),
    ]
    columns = zip(latent["channel_mean"], latent["channel_std"], latent["channel_posterior_std"], strict=True)
    rows = [[(str(channel), ""), *((f"{value:.4g}", "") for value in values)] for channel, values in enumerate(columns)]
    text = (
        "A diffusion model is given (latent - shift_factor) x scaling_factor. The posterior std says how much noise the "
        "encoder adds itself."
    )
    return [Paragraph(text), Facts(facts), DataTable(["channel", "mean", "std", "posterior std"], rows, dense=True)]


def read_png(path: str | Path) -> Tensor:
    """A PNG file that `evaluate` wrote, as uint8 [3, H, W]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
