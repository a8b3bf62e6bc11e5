"""Charts of a run's metrics.jsonl: one small SVG per quantity, against images seen."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from latentae.errors import DataError
from latentae.evaluation.report import Chart

__all__ = ["Series", "chart", "line_chart", "read_log", "training_charts"]

PREFIXES = ("loss/", "validation/")
# matplotlib writes colours as literals; these unlikely ones are replaced by the page's own, which know light from dark
INK, LINE, ACCENT, SECOND = "#010203", "#010204", "#010205", "#010206"
THEME = {INK: "currentColor", LINE: "var(--line, #ccc)", ACCENT: "var(--accent, #2764d8)", SECOND: "var(--second, #c2571a)"}
Series = list[tuple[float, float]]  # (images seen, value)
MOST_POINTS = 1000  # of a line: more than a screen has pixels for


def read_log(path: str | Path, prefixes: tuple[str, ...] = PREFIXES) -> dict[str, Series]:
    """Every number of a metrics.jsonl whose name begins with one of `prefixes` as (images seen, value), in order.

    A line cut short by a crash is passed over; where a resumed run wrote a point again, the later one counts.

    Raises:
        DataError: the file can't be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror}; give a run's metrics.jsonl") from error
    points: dict[str, dict[float, float]] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict) or "images" not in entry:
            continue
        for key, value in entry.items():
            if key.startswith(prefixes) and isinstance(value, int | float) and math.isfinite(value):
                points.setdefault(key, {})[float(entry["images"])] = float(value)
    return {key: sorted(series.items()) for key, series in points.items()}


def training_charts(path: str | Path) -> list[Chart]:
    """A chart for each quantity in a metrics.jsonl, totals and validation first; empty when there is none."""
    series = read_log(path)
    order = sorted(series, key=lambda key: (not key.startswith("validation/"), key != "loss/total", key))
    return [Chart(line_chart(series[key], key), _title(key)) for key in order]


def _title(key: str) -> str:
    """`validation/psnr` -> "Validation PSNR"."""
    kind, name = key.split("/", 1)
    return f"{kind.capitalize()}: {name.upper() if name in ('psnr', 'ssim', 'kl') else name.replace('_', ' ')}"


def line_chart(points: Sequence[tuple[float, float]], label: str) -> str:
    """One line as an inline `<svg>`: the points, and a running mean where they are many."""
    return chart({"": points}, label)


def chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    label: str,
    marks: Sequence[tuple[float, str]] = (),
    linear: bool = False,
) -> str:
    """One or two lines by name as an inline `<svg>`: their points, and running means where they are many.

    Args:
        lines: (images seen, value) of each; names are shown where there are two.
        label: what screen readers say.
        marks: (images seen, short text) of vertical lines.
        linear: whether small values are all alike, as with shares; others that span decades get a logarithmic axis.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # one font family that ships with matplotlib; the page replaces it. The salt keeps ids of charts on one page apart.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(4.2, 2.4), layout="constrained")
        axes = figure.add_subplot()
        low, high = math.inf, -math.inf
        for (name, points), color in zip(lines.items(), (ACCENT, SECOND), strict=False):
            x, y = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
            _draw(axes, x, y, color, name)
            low, high = min(low, y.min()), max(high, y.max())
        for at, text in marks:
            axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.text(at, 1.0, text, color=INK, fontsize=8, ha="center", va="bottom", transform=axes.get_xaxis_transform())
        if low > 0 and high / low > 20 and not linear:
            axes.set_yscale("log")
        elif high - low <= 1e-6 * max(abs(low), abs(high)):  # a running mean of equal numbers differs in its last digits
            axes.set_ylim(low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1))
        if len(lines) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        _plain(axes)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), label)


def _draw(axes: Any, x: np.ndarray, y: np.ndarray, color: str, name: str) -> None:
    if len(x) > 40:
        axes.plot(*_thin(x, y), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*_thin(x, _smooth(y)), color=color, linewidth=1.6, label=name)
    else:
        axes.plot(x, y, color=color, linewidth=1.6, marker="o", markersize=3, label=name)


def _plain(axes: Any) -> None:
    """Images seen along the bottom, a light grid, no frame."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("images seen", color=INK)
    axes.grid(color=LINE, linewidth=0.8)
    axes.tick_params(colors=INK, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of many points the lowest and highest of each stretch, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MOST_POINTS // 2 + 1).astype(int)
    spans = list(itertools.pairwise(cuts))
    kept = [low + extreme for low, high in spans for extreme in (y[low:high].argmin(), y[low:high].argmax())]
    kept = np.unique(kept)
    return x[kept], y[kept]


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred running mean over about a thirtieth of the points; the ends average what there is."""
    half = max(len(values) // 60, 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _inline(svg: str, label: str) -> str:
    """The `<svg>` element alone, scalable, in the page's colours, with a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    for literal, themed in THEME.items():
        rest = rest.replace(literal, themed)
    rest = rest.replace("xlink:href", "href").strip()
    return f'<svg {view.group(0) if view else ""} role="img" aria-label="{escape(label)}">{rest}'
