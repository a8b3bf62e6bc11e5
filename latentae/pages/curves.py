"""Training curves: the numbers of a run's metrics.jsonl, and charts of them against images seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.errors import DataError
from latentae.measures.scores import LABELS
from latentae.pages.charts import Chart, Curve, line_plot

__all__ = ["Series", "curve_chart", "curve_title", "read_log", "run_speed"]

Series = list[tuple[float, float]]  # (images seen, value)
TITLES = {
    "lr": "Learning rate",
    "img_per_s": "Images per second",
    "data_wait": "Share of time spent waiting for data",
    "memory_gb": "Peak memory (GB)",
    "bad_samples": "Unreadable images",
    "skipped_steps": "Skipped steps",
    "adversarial/ratio": "Adaptive ratio: adversarial",
    "alignment/ratio": "Adaptive ratio: alignment",
    "discriminator/logits": "Logits",
    "discriminator/accuracy": "Accuracy",
    "loss/kl": "KL",
    **{f"validation/{metric}": label for metric, label in LABELS.items()},
}
SHARES = ("data_wait", "validation/ssim")  # always on a linear axis


def read_log(path: str | Path) -> dict[str, Series]:
    """Read every number of a metrics.jsonl as name -> (images seen, value) pairs, in order.

    Lines without a number of images, such as one truncated by a crash, are skipped. If a resumed
    run wrote a point again, the later one counts.

    Raises:
        DataError: the file can't be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror}; give a run's metrics.jsonl") from error
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and _is_number(entry.get("images")):
            for key, value in entry.items():
                if _is_number(value):
                    points.setdefault(key, {})[float(entry["images"])] = float(value)
    return {key: sorted(series.items()) for key, series in points.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def curve_title(name: str) -> str:
    """`loss/total` -> "Total", `validation/psnr` -> "PSNR (dB)"."""
    group, _, rest = name.rpartition("/")
    words = (f"gradient norm: {rest}" if group == "gradient_norm" else rest).replace("_", " ")
    return TITLES.get(name, words[:1].upper() + words[1:])


def curve_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]], name: str, marks: Sequence[tuple[float, str]] = ()
) -> Chart:
    """Plot one quantity against images seen.

    Args:
        lines: name in the legend ("" for none) -> (images seen, value) pairs.
        name: key of the quantity in the log.
        marks: (images seen, short text) of vertical lines.
    """
    curves = [Curve(line, points, color) for color, (line, points) in enumerate(lines.items())]
    log_y = False if name in SHARES else None
    return line_plot(curves, name, x="images seen", log_y=log_y, marks=marks, counts=True)


def run_speed(series: Mapping[str, Series]) -> dict[str, float | None]:
    """Speed and cost of a run, from its log; empty if the log has no speed.

    Returns:
        `images_per_second` (median), `seconds` of training without stops, validation and
        checkpoints, `wall_seconds` from the first report to the last, and the peak `memory_gb`.
    """
    speeds = [(images, value) for images, value in series.get("img_per_s", ()) if value > 0]
    if not speeds:
        return {}
    values = sorted(value for _, value in speeds)
    before = [0.0, *(images for images, _ in speeds)]
    times = [time for _, time in series.get("time", ())]
    return {
        "images_per_second": values[len(values) // 2],
        "seconds": sum(
            (images - seen) / value for seen, (images, value) in zip(before, speeds, strict=False)
        ),
        "wall_seconds": max(times) - min(times) if times else None,
        "memory_gb": max((memory for _, memory in series.get("memory_gb", ())), default=None),
    }
