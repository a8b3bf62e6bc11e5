"""Charts of a run's metrics.jsonl: one small SVG per quantity, against images seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latentae.errors import DataError
from latentae.pages.charts import Curve, line_plot
from latentae.pages.report import Chart

__all__ = ["Series", "chart", "line_chart", "read_log", "training_charts"]

PREFIXES = ("loss/", "validation/")
Series = list[tuple[float, float]]  # (images seen, value)


def read_log(path: str | Path, prefixes: tuple[str, ...] = PREFIXES) -> dict[str, Series]:
    """Every number of a metrics.jsonl whose name begins with one of `prefixes` as (images seen, value), in order.

    A line cut short by a crash, or without a number of images, is passed over; where a resumed run wrote a point again, the later one
    counts.

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
        if not isinstance(entry, dict) or not _is_number(entry.get("images")):
            continue
        for key, value in entry.items():
            if key.startswith(prefixes) and _is_number(value):
                points.setdefault(key, {})[float(entry["images"])] = float(value)
    return {key: sorted(series.items()) for key, series in points.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def training_charts(path: str | Path) -> list[Chart]:
    """A chart for each quantity in a metrics.jsonl, totals and validation first; empty when there is none."""
    series = read_log(path)
    order = sorted(series, key=lambda key: (not key.startswith("validation/"), key != "loss/total", key))
    return [Chart(line_chart(series[key], key), _title(key)) for key in order]


def _title(key: str) -> str:
    """`validation/psnr` -> "Validation PSNR"."""
    kind, name = key.split("/", 1)
    return (
        f"{kind.capitalize()}: {name.upper() if name in ('psnr', 'ssim', 'kl') else name.replace('_', ' ')}"
    )


def line_chart(points: Sequence[tuple[float, float]], label: str) -> str:
    """One line as an inline `<svg>`: the points, and a running mean where they are many."""
    return chart({"": points}, label)


def chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    marks: Sequence[tuple[float, str]] = (),
    linear: bool = False,
) -> str:
    """One or a few lines by name as an inline `<svg>`: their points, and running means where they are many.

    Args:
        lines: (images seen, value) of each; names are shown where there are two or more.
        label: what screen readers say.
        marks: (images seen, short text) of vertical lines.
        linear: whether small values are all alike, as with shares; others that span decades get a logarithmic axis.
    """
    curves = [Curve(name, points, color) for color, (name, points) in enumerate(lines.items())]
    log_y = False if linear else None
    return line_plot(
        curves, label, x="images seen", log_y=log_y, marks=marks, counts=True, named=len(curves) > 1
    )
