"""The page of one evaluation, in sections that other reports (the quickstart's) can put into theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from latentae.evaluation.latent_sections import diffusability_sections, latent_sections
from latentae.file_names import METRICS, PER_IMAGE, REPORT
from latentae.files import write_text
from latentae.measures.ranking import rank
from latentae.measures.scores import HIGHER_IS_BETTER, interval_text, methods, metric_label
from latentae.pages.charts import WIDE, Curve, legend, line_plot
from latentae.pages.curves import training_charts
from latentae.pages.pictures import picture_sections, read_png
from latentae.pages.report import (
    Beside,
    Block,
    Chart,
    Charts,
    DataTable,
    Facts,
    Folded,
    Links,
    Notices,
    Paragraph,
    Section,
    Tiles,
    build_report,
)
from latentae.pages.words import DASH, absent, count, number, shape, why

__all__ = [
    "detail_sections",
    "evaluation_sections",
    "read_png",
    "training_sections",
    "write_evaluation_report",
]

FINDINGS = 8  # more are folded
CODECS = ("jpeg", "webp", "pca", "dct")  # curves that stay behind those of models


def write_evaluation_report(
    folder: str | Path, result: Mapping[str, Any], metrics_log: str | Path | None = None
) -> None:
    """Write `folder`/report.html from an evaluation's result and the example pictures in `folder`."""
    data = result["data"]
    name, side = Path(result["model"]["path"]).name, data["resolution"]
    subtitle = f"{name} on {count(data['images'], 'image')} at {side} x {side} pixels"
    files = Links(
        [
            (f"all numbers ({METRICS})", METRICS),
            (f"one row per image ({PER_IMAGE})", PER_IMAGE),
        ]
    )
    sections = [
        *evaluation_sections(folder, result),
        *training_sections(metrics_log),
        *detail_sections(result),
        Section("Files", [files]),
    ]
    footer = f"Made by latentae {result['latentae']}. This page needs no network; keep it beside its files for the links to work."
    write_text(
        Path(folder) / REPORT,
        build_report("How good is this autoencoder?", subtitle, sections, footer),
    )


def evaluation_sections(folder: str | Path, result: Mapping[str, Any]) -> list[Section]:
    """Headline numbers with what they mean, pictures, the table of methods, rate and distortion, the latent space, generation.

    Args:
        folder: where `evaluate` wrote its pictures.
        result: what `evaluate` returned, or its metrics.json.
    """
    folder = Path(folder)
    return [
        Section("At a glance", [_tiles(result), *_findings(result)]),
        *picture_sections(folder, result),
        Section("Against others", list(_table(result))),
        *_rate_distortion(result.get("rate_distortion")),
        *latent_sections(folder, result),
        *diffusability_sections(folder, result.get("diffusability")),
    ]


def training_sections(metrics_log: str | Path | None) -> list[Section]:
    """Loss and validation curves of a run; none without a log or with an empty one."""
    charts = training_charts(metrics_log) if metrics_log is not None and Path(metrics_log).is_file() else []
    caption = "Faint: every logged value; strong: running mean. Validation is measured on held-out images."
    return [Section("Training", [Charts(charts, caption)])] if charts else []


def detail_sections(result: Mapping[str, Any]) -> list[Section]:
    """Conventions, model, data and versions."""
    model, data = result["model"], result["data"]
    facts = [
        ("model", model["path"]),
        ("kind, weights", f"{model['kind']}, {model['weights']}"),
        ("parameters", f"{model['parameters']:,}"),
        ("fingerprint", model["fingerprint"]),
        (
            "shards",
            ", ".join(data["shards"][:4])
            + (f" and {len(data['shards']) - 4} more" if len(data["shards"]) > 4 else ""),
        ),
        ("images", f"{data['images']:,} of {data['available']:,}"),
        *(
            (name, count(data[key], "image"))
            for key, name in (
                ("enlarged", "enlarged"),
                ("gray", "stored as gray"),
                ("sixteen_bit", "of more than 8 bits"),
            )
            if data.get(key)
        ),
        *result["environment"].items(),
    ]
    skipped = data.get("skipped") or []
    blocks: list[Block] = [Facts(facts)]
    if skipped:
        rows = [[(item["key"], ""), (item["reason"], "")] for item in skipped]
        amount = count(data.get("skipped_count") or len(skipped), "image")
        blocks.append(
            Folded(
                f"{amount} that could not be read",
                [DataTable(["image", "reason"], rows, caption=_more(data, skipped))],
            )
        )
    return [
        Section("How it was measured", [Facts(list(result["conventions"].items()))]),
        Section("What was measured, and with what", blocks),
    ]


def _more(data: Mapping[str, Any], skipped: list[Any]) -> str:
    return (
        f"The first {len(skipped)} of {data['skipped_count']:,}."
        if (data.get("skipped_count") or 0) > len(skipped)
        else ""
    )


def _tiles(result: Mapping[str, Any]) -> Tiles:
    tiles = []
    for metric, interval in result["metrics"].items():
        mean, range_ = interval_text(metric, interval)
        tiles.append(
            (
                metric_label(metric, result),
                mean,
                f"95 %: {range_}" if interval["mean"] is not None else range_,
            )
        )
    frechet = result.get("frechet") or {}
    if "values" in frechet:
        note = f"of {count(frechet['images'], 'image')}; between two halves of the originals: {number(frechet.get('floor'))}"
        tiles.append((f"{frechet['name']} ↓", number(frechet["values"].get("model")), note))
    latent, size = result["latent"], result["baselines"]["latent_8bit"]
    fewer = f"{number(latent['image_numbers_per_latent_number'], '.3g')} times fewer numbers than the image"
    tiles.append(("latent", shape(latent["shape"]), fewer))
    bits = f"8 bits and deflate: {number(size.get('bits_per_pixel'), '.2f')} bits a pixel"
    tiles.append(("as bytes", number(size.get("bytes_per_image"), ",.0f"), bits))
    return Tiles(tiles)


def _findings(result: Mapping[str, Any]) -> Iterator[Block]:
    notices = [(item["kind"], item["text"]) for item in result["findings"]]
    yield Notices(notices[:FINDINGS])
    if len(notices) > FINDINGS:
        yield Folded(f"{len(notices) - FINDINGS} more", [Notices(notices[FINDINGS:])])


def _table(result: Mapping[str, Any]) -> Iterator[Block]:
    """Every method with every number, and why others are not there."""
    entries, metrics, frechet = methods(result), list(result["metrics"]), result.get("frechet") or {}
    columns = [[entry["metrics"].get(metric, {}).get("mean") for entry in entries] for metric in metrics]
    best = {
        (_best(values, HIGHER_IS_BETTER[metric]), column)
        for column, (metric, values) in enumerate(zip(metrics, columns, strict=True), 1)
    }
    header, distances = (
        ["method", *(metric_label(metric, result) for metric in metrics)],
        frechet.get("values"),
    )
    if distances is not None:
        header.append(f"{frechet['name']} ↓")
        best.add((_best([distances.get(entry["name"]) for entry in entries], higher=False), len(metrics) + 1))
    rows = []
    for entry in entries:
        row = [
            (entry["label"], _small(entry)),
            *(_cell(metric, entry["metrics"].get(metric)) for metric in metrics),
        ]
        row += [(number(distances.get(entry["name"])), "")] if distances is not None else []
        rows.append([*row, _bytes(entry), (number(_floats(entry, result)), "")])
    caption = "Mean over images and its 95 % bootstrap interval; the best mean of a column stands out."
    if frechet.get("floor") is not None:
        caption += f" {frechet['name']}: two halves of the originals, which have no image in common, are {number(frechet['floor'])} apart."
    stressed = frozenset((row, column) for row, column in best if row is not None)
    yield DataTable(
        [*header, "bytes / image", "floats / pixel"],
        rows,
        stressed,
        caption,
        wide=True,
        strong=frozenset({0}),
    )
    others = [*(result.get("compared") or ()), *result["baselines"].values()]
    notices = [
        ("note", f"{item['label']}: not measured; {item['missing'].rstrip('.')}.")
        for item in others
        if "missing" in item
    ]
    if "missing" in frechet:
        notices.append(("note", f"Frechet distance: not measured; {frechet['missing'].rstrip('.')}."))
    yield Notices(notices)


def _best(values: list[float | None], higher: bool) -> int | None:
    rows = [row for row, value in enumerate(values) if value is not None]
    found = [(-1 if higher else 1) * value for value in values if value is not None]
    return rows[next(rank(found))] if rows else None


def _small(entry: Mapping[str, Any]) -> str:
    """What else is to be said of a method, briefly."""
    if "components" in entry:
        patches = f", {entry['patches']:,} patches" if entry.get("patches") else ""
        return f"{entry['components']} components{patches}"
    if entry.get("quality") is not None:
        return f"quality {number(entry['quality'], '.3g')} on average"
    if entry.get("latent"):
        return f"{shape(entry['latent']['shape'])}, {number(entry['parameters'] / 1e6, '.3g')} M parameters"
    return ""


def _cell(metric: str, interval: Mapping[str, Any] | None) -> tuple[str, str]:
    return (DASH, "") if interval is None else interval_text(metric, interval)


def _bytes(entry: Mapping[str, Any]) -> tuple[str, str]:
    bits = entry.get("bits_per_pixel")
    return number(
        entry.get("bytes_per_image"), ",.0f"
    ), "" if bits is None else f"{number(bits, '.3g')} bits / pixel"


def _floats(entry: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Numbers a pixel that a method keeps; codecs that keep bits have none."""
    if "latent" in entry:
        return entry["latent"]["floats_per_pixel"]
    return (
        result["latent"]["floats_per_pixel"]
        if entry["name"] in ("model", "latent_8bit", "pca", "dct")
        else None
    )


def _rate_distortion(found: Mapping[str, Any] | None) -> list[Section]:
    title, reason = "Rate and distortion", why(found)
    if found is None:
        return []
    curves = [
        Curve(
            item["label"],
            [(point["bits_per_pixel"], point["psnr"]) for point in item["points"]],
            color,
            item["name"] not in CODECS,
        )
        for color, item in enumerate(found.get("curves", []))
    ]
    if reason is not None or not curves:
        return [Section(title, [absent(title, reason or "no method gave a point")])]
    svg = line_plot(curves, "PSNR over bits a pixel", x="bits a pixel", y="PSNR (dB)", log_x=True, size=WIDE)
    text = (
        f"Mean PSNR over the bytes that {count(found['images'], 'image')} really take, headers and ranges included: what lies higher or "
        "further to the left is better. Models store their latents in 2 to 8 bits a number, PCA and block DCT ever more components, JPEG "
        "and WebP whole files at rising quality. Models are drawn strong, the others dashed."
    )
    rows = [
        [
            (item["label"], str(point.get("setting", ""))),
            (number(point["bits_per_pixel"], ".3g"), ""),
            (number(point["psnr"], ".2f"), ""),
        ]
        for item in found["curves"]
        for point in item["points"]
    ]
    table = Folded("All points", [DataTable(["method", "bits / pixel", "PSNR (dB)"], rows, dense=True)])
    left_out = [
        ("note", f"{item['label']}: left out; {item['reason'].rstrip('.')}.")
        for item in found.get("left_out") or ()
    ]
    chart = Charts([Chart(svg, "PSNR at the bytes of real files", legend(curves))])
    return [Section(title, [Beside([chart], [Paragraph(text), Notices(left_out), table])])]
