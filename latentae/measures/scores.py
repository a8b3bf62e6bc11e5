"""From one value per image to the numbers, sentences and table of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from latentae.measures.metrics import bootstrap_mean

__all__ = [
    "HIGHER_IS_BETTER",
    "Scores",
    "finding",
    "interval_text",
    "methods",
    "metric_label",
    "paired",
    "print_table",
]

HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "perceptual": False}
NAMES = {"psnr": "PSNR", "ssim": "SSIM"}
UNITS = {"psnr": " dB", "ssim": "", "perceptual": ""}
DIGITS = {"psnr": 2, "ssim": 4, "perceptual": 4}


@dataclass
class Scores:
    """The values of one method, one per image; NaN where the method has no result for an image."""

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
        """Mean over the images that have a value."""
        return bootstrap_mean(self.values.get(name, []), resamples=1).mean


def paired(model: Scores, other: Scores, seed: int) -> dict[str, Any]:
    """For each metric, model - other on the images both have: mean, 95 % interval, and who is better.

    Better is "unclear" where the interval holds 0, or where the mean prints as 0.
    Two infinite values (both images exact) count as equal; an infinite difference is left out and counted.
    """
    result = {}
    for metric, higher in HIGHER_IS_BETTER.items():
        if metric not in model.values or metric not in other.values:
            continue
        a, b = np.array(model.values[metric]), np.array(other.values[metric])
        with np.errstate(invalid="ignore"):
            interval = bootstrap_mean(np.where(np.isinf(a) & (a == b), 0.0, a - b), seed)
        better = "unclear"
        if (
            interval.mean is not None
            and interval.low is not None
            and interval.high is not None
            and interval.n > 1
        ):
            visible = (
                abs(interval.mean) >= 0.5 * 10 ** -DIGITS[metric]
            )  # less is printed as 0, and may be rounding error
            if visible and not interval.low <= 0 <= interval.high:
                better = "model" if (interval.low > 0) == higher else "baseline"
        result[metric] = {"better": better, **asdict(interval)}
    return result


def finding(
    metric: str, name: str, difference: Mapping[str, Any], model: str, baseline: str
) -> dict[str, str]:
    """One sentence about a paired comparison, and whether it is good or bad news: {"kind", "text"}.

    Args:
        metric: "psnr", "ssim" or "perceptual".
        name: how the metric is called, with its backbone.
        difference: one entry of `paired`.
        model: what stands for the model, such as "this model".
        baseline: what it is compared with.
    """
    if difference["mean"] is None:
        return {
            "kind": "note",
            "text": f"{name}: {model} and {baseline} have no finite difference on any image.",
        }
    n = f"{difference['n']} image{'s' if difference['n'] != 1 else ''}"
    amount = f"{abs(difference['mean']):.{DIGITS[metric]}f}{UNITS[metric]}"
    low, high = sorted((difference["low"], difference["high"]), key=abs)
    interval = f"paired 95 % interval {abs(low):.{DIGITS[metric]}f} to {abs(high):.{DIGITS[metric]}f}, {n}"
    if difference["better"] == "model":
        return {"kind": "good", "text": f"{name}: {model} beats {baseline} by {amount} ({interval})."}
    if difference["better"] == "baseline":
        return {"kind": "bad", "text": f"{name}: {baseline} beats {model} by {amount} ({interval})."}
    low, high = (f"{difference[end]:+.{DIGITS[metric]}f}" for end in ("low", "high"))
    return {
        "kind": "note",
        "text": f"{name}: no clear difference between {model} and {baseline} (95 % interval {low} to {high}, {n}).",
    }


def metric_label(metric: str, result: Mapping[str, Any], arrow: bool = True) -> str:
    """`PSNR (dB) ↑`; the perceptual distance goes by its own name."""
    name = result["perceptual"]["name"] if metric == "perceptual" else NAMES[metric]
    unit = f" ({UNITS[metric].strip()})" if UNITS[metric] and arrow else ""
    return name + unit + ((" ↑" if HIGHER_IS_BETTER[metric] else " ↓") if arrow else "")


def interval_text(metric: str, interval: Mapping[str, Any]) -> tuple[str, str]:
    """("24.61", "24.10 to 25.13"), and ("∞", "n identical images") where no value is finite."""
    exact = (
        f"{interval['infinite']} identical image{'s' if interval['infinite'] != 1 else ''}"
        if interval["infinite"]
        else ""
    )
    if interval["mean"] is None:
        return ("∞" if interval["infinite"] else "-"), exact
    mean, low, high = (f"{interval[key]:.{DIGITS[metric]}f}" for key in ("mean", "low", "high"))
    return mean, f"{low} to {high}" + (f"; without {exact}" if exact else "")


def methods(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every method of an evaluation that has numbers, the model first; each has `name`, `label` and `metrics`."""
    return [
        {"name": "model", "label": "this model", "metrics": result["metrics"]},
        *({"name": name, **other} for name, other in _named(result) if "metrics" in other),
    ]


def _named(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """8-bit latents, then the models compared, then the baselines."""
    baselines = dict(result["baselines"])
    quantised = baselines.pop("latent_8bit", None)
    yield from [("latent_8bit", quantised)] if quantised else []
    yield from ((other["name"], other) for other in result.get("compared", ()))
    yield from baselines.items()


def print_table(result: Mapping[str, Any]) -> None:
    """Print the metrics of an evaluation as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    data = result["data"]
    table = Table(
        title=f"{data['images']} images at {data['resolution']} px: mean (95 % interval)",
        title_justify="left",
    )
    table.add_column("method")
    for metric in result["metrics"]:
        table.add_column(metric_label(metric, result), justify="right")
    distances = result.get("frechet", {}).get("values", {})
    if distances:
        table.add_column(f"{result['frechet']['name']} ↓", justify="right")
    table.add_column("bytes / image", justify="right")
    for method in methods(result):
        cells = [
            "{} ({})".format(*interval_text(metric, method["metrics"][metric]))
            for metric in result["metrics"]
        ]
        cells += (
            [f"{distances[method['name']]:.4g}" if method["name"] in distances else "-"] if distances else []
        )
        size = method.get("bytes_per_image")
        table.add_row(method["label"], *cells, "-" if size is None else f"{size:,.0f}")
    console = Console()
    console.print(table)
    for sentence in result["findings"]:
        console.print("- " + sentence["text"], markup=False, highlight=False)
