"""The page of one evaluation. The quickstart's page includes the same results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from latentae.file_names import REPORT
from latentae.files import write_text
from latentae.measures.latents.report import ACTIVE_VARIANCE
from latentae.measures.scores import HIGHER_IS_BETTER, interval_text, methods, metric_label, rank
from latentae.pages.charts import WIDE, Chart, Curve, bar_plot, line_plot
from latentae.pages.curves import curve_chart, curve_title, read_log
from latentae.pages.images import BRIGHTEST, LARGEST, TICKS, picture, read_png, scale_gradient, shrink
from latentae.pages.render import number, render, why

__all__ = ["evaluation_context", "example_pictures", "write_evaluation_report"]

CODECS = ("jpeg", "webp", "pca", "dct")  # drawn dashed, behind the models
PAGE_PIXELS = 5_000_000  # of all galleries; a pixel of a photo takes about 2.7 bytes
INTERPOLATION = 9 * 128  # maximum width of the picture of an interpolation, in pixels
MODEL = {"original": "original", "model": "this model", "heat": "error"}
BASELINES = {
    "pca": "PCA, same floats",
    "dct": "block DCT, same floats",
    "jpeg": "JPEG, same bytes",
    "webp": "WebP, same bytes",
}
GENERATED = {  # labels of pictures of generated images
    "samples": "Sampled by the tiny flow, decoded",
    "flow": "Sampled by the tiny flow, decoded",
    "interpolated": "Midpoints between neighbors, decoded",
}


def write_evaluation_report(
    folder: str | Path, result: Mapping[str, Any], metrics_log: str | Path | None = None
) -> None:
    """Write `folder`/report.html from a result and the example images in `folder`."""
    page = render("evaluation.html", **evaluation_context(Path(folder), result, metrics_log))
    write_text(Path(folder) / REPORT, page)


def evaluation_context(
    folder: Path, result: Mapping[str, Any], metrics_log: str | Path | None = None
) -> dict[str, Any]:
    """Prepare the values that `evaluation_results.html` and `evaluation_details.html` use.

    Args:
        folder: where `evaluate` wrote its images.
        result: return value of `evaluate`, or its metrics.json.
        metrics_log: metrics.jsonl of the model's run, for the training curves.
    """
    latent, diagnostics = result["latent"], result.get("diagnostics") or {}
    interpolation = diagnostics.get("interpolation") or {}
    diffusability = result.get("diffusability") or {}
    rate_distortion = result.get("rate_distortion") or {}
    return {
        "result": result,
        "name": Path(result["model"]["path"]).name,
        "metrics": {metric: metric_label(metric, result) for metric in result["metrics"]},
        "intervals": {metric: interval_text(metric, value) for metric, value in result["metrics"].items()},
        "methods": _method_rows(result),
        "galleries": _galleries(folder, result),
        "error_scale": {"gradient": scale_gradient(), "ticks": TICKS, "brightest": BRIGHTEST},
        "active": ACTIVE_VARIANCE,
        "channel_charts": _channel_charts(latent),
        "channels": _channel_columns(latent),
        "spectrum_chart": _spectrum_chart(latent.get("spectrum")),
        "noise": _noise(diagnostics.get("sensitivity") or []),
        "activation_charts": _activation_charts(diagnostics.get("half") or {}),
        "interpolation": _interpolation(folder, interpolation) if "file" in interpolation else None,
        "generated": [
            picture(shrink(read_png(folder / file), 2 * LARGEST), str(GENERATED.get(name, name)))
            for name, file in (diffusability.get("files") or {}).items()
        ],
        "rate_chart": _rate_chart(rate_distortion.get("curves")),
        "training_charts": _training_charts(metrics_log),
    }


def _method_rows(result: Mapping[str, Any]) -> list[list[tuple[str, str, bool]]]:
    """One row of cells (text, small text, is best) for each method that has numbers."""
    entries, distances = methods(result), (result.get("frechet") or {}).get("values")
    best = {
        metric: _best(
            [entry["metrics"].get(metric, {}).get("mean") for entry in entries], HIGHER_IS_BETTER[metric]
        )
        for metric in result["metrics"]
    }
    if distances is not None:
        best["frechet"] = _best([distances.get(entry["name"]) for entry in entries], higher=False)
    rows = []
    for index, entry in enumerate(entries):
        row = [(entry["label"], _detail(entry), False)]
        for metric in result["metrics"]:
            interval = entry["metrics"].get(metric)
            text, small = (number(None), "") if interval is None else interval_text(metric, interval)
            row.append((text, small, index == best[metric]))
        if distances is not None:
            row.append((number(distances.get(entry["name"])), "", index == best["frechet"]))
        bits = entry.get("bits_per_pixel")
        small = "" if bits is None else f"{number(bits, '.3g')} bits / pixel"
        row.append((number(entry.get("bytes_per_image"), ",.0f"), small, False))
        rows.append([*row, (number(_floats(entry, result)), "", False)])
    return rows


def _best(values: list[float | None], higher: bool) -> int | None:
    rows = [row for row, value in enumerate(values) if value is not None]
    found = [(-1 if higher else 1) * value for value in values if value is not None]
    return rows[next(rank(found))] if rows else None


def _detail(entry: Mapping[str, Any]) -> str:
    if "components" in entry:
        patches = f", {entry['patches']:,} patches" if entry.get("patches") else ""
        return f"{entry['components']} components{patches}"
    if entry.get("quality") is not None:
        return f"mean quality {number(entry['quality'], '.3g')}"
    if entry.get("latent"):
        shape = " x ".join(map(str, entry["latent"]["shape"]))
        return f"{shape}, {number(entry['parameters'] / 1e6, '.3g')} M parameters"
    return ""


def _floats(entry: Mapping[str, Any], result: Mapping[str, Any]) -> float | None:
    """Numbers per pixel that a method stores; codecs store bits instead."""
    if "latent" in entry:
        return entry["latent"]["floats_per_pixel"]
    same = entry["name"] in ("model", "latent_8bit", "pca", "dct")
    return result["latent"]["floats_per_pixel"] if same else None


def _galleries(folder: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The example images by kind: evenly spaced, hardest and easiest, as far as there are any."""
    by_kind: dict[str, list[Mapping[str, Any]]] = {"spread": [], "worst": [], "best": []}
    for example in result.get("examples") or []:
        by_kind[example.get("kind", "spread")].append(example)
    pictures = sum(
        len(example["files"]) if kind == "spread" else len(MODEL)
        for kind, examples in by_kind.items()
        for example in examples
    )
    limit = min(LARGEST, int(math.sqrt(PAGE_PIXELS / max(pictures, 1))))
    compared = {other["name"]: other["label"] for other in result.get("compared", ())}
    labels = {**MODEL, **compared, **BASELINES}
    return [
        {
            "kind": kind,
            "rows": [
                example_pictures(folder, example, labels if kind == "spread" else MODEL, limit)
                for example in examples
            ],
            "errors": any("heat" in example["files"] for example in examples),
            "limit": limit if _side(folder / examples[0]["files"]["original"]) > limit else None,
        }
        for kind, examples in by_kind.items()
        if examples
    ]


def _side(file: Path) -> int:
    with Image.open(file) as image:
        return max(image.size)


def example_pictures(
    folder: Path, example: Mapping[str, Any], labels: Mapping[str, str], limit: int = LARGEST
) -> dict[str, Any]:
    """Prepare an image and its reconstructions, each with its PSNR, for `ui.group`.

    Args:
        folder: of the evaluation.
        example: item of `examples` in its result.
        labels: method -> label, in the order shown; methods without a file are skipped.
        limit: maximum length of the longer side, in pixels.
    """
    pictures = []
    for name, label in labels.items():
        if name in example["files"]:
            detail = ""
            if name in example.get("psnr", {}):
                value = example["psnr"][name]
                detail = "identical" if value is None or not math.isfinite(value) else f"{value:.2f} dB"
            pictures.append(picture(shrink(read_png(folder / example["files"][name]), limit), label, detail))
    return {"title": example["key"], "pictures": pictures}


def _channel_charts(latent: Mapping[str, Any]) -> dict[str, Chart]:
    """Title -> bars of a statistic by channel."""
    spread = {"of the latent": latent["channel_std"], "of the posterior": latent["channel_posterior_std"]}
    charts = {
        "Mean": bar_plot({"": latent["channel_mean"]}, "mean of each channel", x="channel"),
        "Standard deviation": bar_plot(spread, "standard deviation of each channel", x="channel"),
    }
    if latent.get("kl_nats_per_channel"):
        bars = {"": latent["kl_nats_per_channel"]}
        charts["KL to a standard normal"] = bar_plot(
            bars, "KL of each channel", x="channel", y="nats per image"
        )
    if latent.get("channel_mean_variance"):
        charts["Variance of the posterior mean; active above the line"] = bar_plot(
            {"": latent["channel_mean_variance"]},
            "variance of each posterior mean",
            color=2,
            x="channel",
            log=True,
            level=(ACTIVE_VARIANCE, ""),
        )
    return charts


def _channel_columns(latent: Mapping[str, Any]) -> dict[str, Sequence[float]]:
    columns = {
        "mean": latent["channel_mean"],
        "std": latent["channel_std"],
        "posterior std": latent["channel_posterior_std"],
        "KL (nats)": latent.get("kl_nats_per_channel"),
    }
    return {name: values for name, values in columns.items() if values is not None}


def _spectrum_chart(spectrum: Mapping[str, Any] | None) -> Chart | None:
    if spectrum is None:
        return None
    curves = [
        Curve(name, list(zip(spectrum["frequency"], spectrum[key], strict=True)), color, strong=color == 0)
        for color, (key, name) in enumerate(
            [("latent", "latent, equal weight per channel"), ("image", "image, resized to the latent's size")]
        )
    ]
    return line_plot(
        curves, "spectrum", x="cycles per latent pixel", y="share of power", log_y=True, size=WIDE
    )


def _noise(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """PSNR under noise on the latent: a chart and its rows, or the reason why there is none."""
    rows = [item for item in found if item.get("psnr") is not None]
    if not rows:
        return {"missing": why(found[0] if found else None) or "no image has a finite PSNR"}
    without = [(0.0, item["psnr"] + item["drop"]) for item in rows if item.get("drop") is not None][:1]
    curve = Curve("", [*without, *((item["noise"], item["psnr"]) for item in rows)])
    label, x = "PSNR with noise on the latent", "noise, in stds of the latent"
    return {"rows": rows, "chart": line_plot([curve], label, x=x, y="PSNR (dB)")}


def _activation_charts(half: Mapping[str, Any]) -> dict[str, Chart]:
    """ "encoder" and "decoder" -> the largest activation of each stage."""
    limit = half.get("fp16_max")
    return {
        coder: bar_plot(
            {"": list(stages.values())},
            f"largest activations of the {coder}",
            color=color,
            names=list(stages),
            log=True,
            level=(limit, "fp16 maximum") if limit else None,
            horizontal=True,
            size=(4.2, 0.9 + 0.22 * len(stages)),
        )
        for color, (coder, stages) in enumerate((half.get("activation_maxima") or {}).items())
    }


def _interpolation(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    first, last = found["keys"]
    detail = f"{first} to {last}, {found['steps']} steps, {found['mode']}"
    return picture(shrink(read_png(folder / found["file"]), INTERPOLATION), "Between two images", detail)


def _rate_chart(curves: Sequence[Mapping[str, Any]] | None) -> Chart | None:
    drawn = [
        Curve(
            item["label"],
            [(point["bits_per_pixel"], point["psnr"]) for point in item["points"]],
            color,
            strong=item["name"] not in CODECS,
        )
        for color, item in enumerate(curves or ())
    ]
    label, x = "PSNR over bits per pixel", "bits per pixel"
    return line_plot(drawn, label, x=x, y="PSNR (dB)", log_x=True, size=WIDE) if drawn else None


def _training_charts(metrics_log: str | Path | None) -> dict[str, Chart]:
    """Title -> curve of each validation metric, then of each loss; empty without a log."""
    series = read_log(metrics_log) if metrics_log is not None and Path(metrics_log).is_file() else {}
    names = [name for name in series if name.startswith(("loss/", "validation/"))]
    names.sort(key=lambda name: (not name.startswith("validation/"), name != "loss/total", name))
    return {
        f"{name.partition('/')[0].capitalize()}: {curve_title(name)}": curve_chart({"": series[name]}, name)
        for name in names
    }
