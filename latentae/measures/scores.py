"""Scores of methods, one value per image, and their summaries, comparisons and labels in tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from latentae.measures.metrics import bootstrap_mean

__all__ = [
    "DIGITS",
    "HIGHER_IS_BETTER",
    "LABELS",
    "NAMES",
    "SAME",
    "UNITS",
    "Scores",
    "finding",
    "interval_text",
    "methods",
    "metric_label",
    "paired",
    "print_table",
    "rank",
]

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "perceptual": False}
NAMES = {"psnr": "PSNR", "ssim": "SSIM"}
UNITS = {"psnr": " dB", "ssim": "", "perceptual": ""}
DIGITS = {"psnr": 2, "ssim": 4, "perceptual": 4}
LABELS = {"psnr": "PSNR (dB)", "ssim": "SSIM", "perceptual": "Perceptual distance"}
SAME = 1e-4  # relative difference of equal measurements; fp32 repeats one image or model more closely


@dataclass
class Scores:
    """Values of one method, one per image; NaN for an image without a result."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, metric: str, batch: Tensor | Sequence[float]) -> None:
        """Append a batch of values."""
        self.values.setdefault(metric, []).extend(batch.tolist() if isinstance(batch, Tensor) else batch)

    def summary(self, seed: int) -> dict[str, Any]:
        """Mean and 95 % interval of each metric, as plain JSON values."""
        return {
            metric: asdict(bootstrap_mean(values, seed))
            for metric, values in self.values.items()
            if metric in HIGHER_IS_BETTER
        }

    def mean(self, name: str) -> float | None:
        """Mean over the images with a value."""
        return bootstrap_mean(self.values.get(name, []), resamples=1).mean


def paired(model: Scores, other: Scores, seed: int) -> dict[str, Any]:
    """Differences model - other per metric: mean, 95 % interval, and which is better.

    They are taken on the images that both have.

    The result is "unclear" if the interval contains 0, or if the mean prints as 0. Two infinite
    values (both images exact) count as equal. An infinite difference is left out and counted.
    """
    result = {}
    for metric, higher in HIGHER_IS_BETTER.items():
        if metric not in model.values or metric not in other.values:
            continue
        a, b = np.array(model.values[metric]), np.array(other.values[metric])
        with np.errstate(invalid="ignore"):
            interval = bootstrap_mean(np.where(np.isinf(a) & (a == b), 0.0, a - b), seed)
        better = "unclear"
        mean, low, high = interval.mean, interval.low, interval.high
        if mean is not None and low is not None and high is not None and interval.n > 1:
            visible = abs(mean) >= 0.5 * 10 ** -DIGITS[metric]  # less prints as 0, and may be rounding error
            if visible and not low <= 0 <= high:
                better = "model" if (low > 0) == higher else "baseline"
        result[metric] = {"better": better, **asdict(interval)}
    return result


def finding(
    metric: str, name: str, difference: Mapping[str, Any], model: str, baseline: str
) -> dict[str, str]:
    """One sentence about a paired comparison, and whether it is good or bad news: {"kind", "text"}.

    Args:
        metric: "psnr", "ssim" or "perceptual".
        name: of the metric, with its network.
        difference: one entry of `paired`.
        model: words for the model, such as "this model".
        baseline: words for the other method.
    """
    if difference["mean"] is None:
        text = f"{name}: {model} and {baseline} have no finite difference on any image."
        return {"kind": "note", "text": text}
    n, digits = f"{difference['n']} image{'s' if difference['n'] != 1 else ''}", DIGITS[metric]
    if difference["better"] not in ("model", "baseline"):
        low, high = (f"{difference[end]:+.{digits}f}" for end in ("low", "high"))
        text = f"no clear difference between {model} and {baseline} (95 % interval {low} to {high}, {n})."
        return {"kind": "note", "text": f"{name}: {text}"}
    won = difference["better"] == "model"
    winner, loser = (model, baseline) if won else (baseline, model)
    amount = f"{abs(difference['mean']):.{digits}f}{UNITS[metric]}"
    low, high = sorted((abs(difference["low"]), abs(difference["high"])))
    interval = f"paired 95 % interval {low:.{digits}f} to {high:.{digits}f}, {n}"
    return {
        "kind": "good" if won else "bad",
        "text": f"{name}: {winner} beats {loser} by {amount} ({interval}).",
    }


def metric_label(metric: str, result: Mapping[str, Any], arrow: bool = True) -> str:
    """`PSNR (dB) ↑`; the perceptual distance has the name of its network."""
    name = result["perceptual"]["name"] or "perceptual distance" if metric == "perceptual" else NAMES[metric]
    if not arrow:
        return name
    return (name if metric == "perceptual" else LABELS[metric]) + (" ↑" if HIGHER_IS_BETTER[metric] else " ↓")


def interval_text(metric: str, interval: Mapping[str, Any]) -> tuple[str, str]:
    """("24.61", "24.10 to 25.13"), or ("∞", "n identical images") if no value is finite."""
    n = interval["infinite"]
    exact = f"{n} identical image{'s' if n != 1 else ''}" if n else ""
    if interval["mean"] is None:
        return ("∞" if n else "-"), exact
    mean, low, high = (f"{interval[key]:.{DIGITS[metric]}f}" for key in ("mean", "low", "high"))
    return mean, f"{low} to {high}" + (f"; without {exact}" if exact else "")


def methods(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Methods with results, the model first, each with `name`, `label` and `metrics`."""
    quantized, *baselines = ({"name": name, **other} for name, other in result["baselines"].items())
    others = [quantized, *result.get("compared", ()), *baselines]
    model = {"name": "model", "label": "this model", "metrics": result["metrics"]}
    return [model, *(other for other in others if "metrics" in other)]


def print_table(result: Mapping[str, Any]) -> None:
    """Print the metrics of an evaluation as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    data = result["data"]
    title = f"{data['images']} images at {data['resolution']} px: mean (95 % interval)"
    table = Table(title=title, title_justify="left")
    table.add_column("method")
    for metric in result["metrics"]:
        table.add_column(metric_label(metric, result), justify="right")
    distances = result.get("frechet", {}).get("values", {})
    if distances:
        table.add_column(f"{result['frechet']['name']} ↓", justify="right")
    table.add_column("bytes / image", justify="right")
    for method in methods(result):
        intervals = [interval_text(metric, method["metrics"][metric]) for metric in result["metrics"]]
        cells = [f"{mean} ({interval})" for mean, interval in intervals]
        if distances:
            cells.append(f"{distances[method['name']]:.4g}" if method["name"] in distances else "-")
        size = method.get("bytes_per_image")
        table.add_row(method["label"], *cells, "-" if size is None else f"{size:,.0f}")
    console = Console()
    console.print(table)
    for sentence in result["findings"]:
        console.print("- " + sentence["text"], markup=False, highlight=False)


def rank(values: ArrayLike, *, relative: float = SAME, absolute: float = 0.0) -> Iterator[int]:
    """Yield the positions of values from the lowest to the highest; ties keep their order.

    Nearly equal values count as equal, because last bits depend on the processor, the batch and the
    number of threads.

    Args:
        values: [N], without NaN.
        relative: largest relative difference between equal values.
        absolute: largest absolute difference between equal values.
    """
    found = np.asarray(values, dtype=np.float64)
    order = np.argsort(found, kind="stable").tolist()
    start = 0
    while start < len(order):
        stop, lowest = start + 1, found[order[start]]
        while stop < len(order) and math.isclose(
            lowest, found[order[stop]], rel_tol=relative, abs_tol=absolute
        ):
            stop += 1
        yield from sorted(order[start:stop])
        start = stop
