"""Charts as inline SVG in the page's own colors: curves and bars, with linear or logarithmic axes.

    chart = line_plot([Curve("run A", a), Curve("run B", b)], "PSNR", x="images seen", y="dB")

A template draws one with `ui.chart("Title", chart)`. Charts have up to eight colors. Readers with
any color vision can tell them apart on light and dark pages (tested). Curves differ in markers too.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup

__all__ = ["COLORS", "WIDE", "Chart", "Curve", "bar_plot", "legend_key", "line_plot"]

# matplotlib writes colors as literals. These unlikely ones are replaced by variables of page.css.
INK, LINE = "#010203", "#010204"
COLORS = tuple(f"#0102{number:02x}" for number in range(5, 13))
"""Placeholders for the eight colors of curves and bars."""
_LIGHT = ("#2764d8", "#c2571a", "#1c8ea9", "#6e3b49", "#d77e06", "#f72d8e", "#4f3f99", "#5d7e66")
_VARIABLES = ("--accent", "--second", *(f"--series-{number}" for number in range(3, 9)))
_THEME = {INK: "currentColor", LINE: "var(--line, #ccc)"} | {
    placeholder: f"var({variable}, {light})"
    for placeholder, variable, light in zip(COLORS, _VARIABLES, _LIGHT, strict=True)
}
_SHAPES = {  # marker of each color in matplotlib -> its SVG path around (12, 6)
    "o": "M12 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "s": "M8.4 2.4h7.2v7.2H8.4z",
    "D": "M12 1l5 5l-5 5l-5-5z",
    "^": "M12 1.5l4.8 9H7.2z",
    "v": "M12 10.5l4.8-9H7.2z",
    "P": "M10.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "X": "M8.8 1.2l3.2 3.2 3.2-3.2 1.6 1.6-3.2 3.2 3.2 3.2-1.6 1.6-3.2-3.2-3.2 3.2-1.6-1.6 3.2-3.2-3.2-3.2z",
    "p": "M12 1l4.8 3.5l-1.8 5.7H9l-1.8-5.7z",
}
_MARKERS = tuple(_SHAPES)
SIZE, WIDE = (4.2, 2.4), (4.7, 3.1)
"""Sizes in inches. Charts are narrow so that their text can be read on a phone."""
MOST_POINTS = 1000  # of a drawn line: more than a screen has pixels
MANY = 40  # a longer curve has no markers


@dataclass(frozen=True)
class Chart:
    """A chart for a template: its `<svg>` element and the keys of its legend."""

    svg: Markup
    legend: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: text in the legend; "" for none.
        points: (x, y) pairs; points that are not finite are skipped.
        color: index of the color, modulo 8.
        strong: draw a thick solid line; others are thin and dashed.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    strong: bool = True


def legend_key(name: str, color: int, line: str = "solid", marker: bool = True) -> dict[str, str]:
    """Legend entry of a curve (`line` is "solid" or "dashed") or of bars (`line` is "")."""
    shape = _SHAPES[_MARKERS[color % len(_MARKERS)] if line else "s"] if marker else ""
    return {
        "name": name,
        "color": f"var({_VARIABLES[color % len(_VARIABLES)]})",
        "line": line,
        "shape": shape,
    }


def line_plot(
    curves: Sequence[Curve],
    label: str,
    *,
    x: str = "",
    y: str = "",
    log_x: bool = False,
    log_y: bool | None = None,
    marks: Sequence[tuple[float, str]] = (),
    counts: bool = False,
    size: tuple[float, float] = SIZE,
) -> Chart:
    """Plot curves. A long curve is drawn faintly, with its running mean.

    Args:
        curves: may be empty or without points.
        label: text for screen readers; charts of one page need different labels.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        log_x: use a logarithmic horizontal axis and skip points at 0 or less.
        log_y: the same for the vertical axis. By default it is logarithmic if all values are
            positive and their ratio exceeds 20.
        marks: (x, short text) of vertical lines.
        counts: x counts things, such as images: tick labels are integers with k and M.
        size: in inches.
    """
    with _figure(label, size) as (figure, axes):
        shown = [_finite_points(curve.points, log_x, bool(log_y)) for curve in curves]
        for curve, (xs, ys) in zip(curves, shown, strict=True):
            if len(xs):
                _draw_curve(axes, curve, xs, ys)
        for at, text in marks:
            _draw_level(axes, at, text, vertical=True)
        xs, ys = (np.concatenate(axis) for axis in zip(*shown, strict=True)) if shown else np.empty((2, 0))
        if len(xs):
            _scale_y(axes, float(ys.min()), float(ys.max()), log_y)
            _scale_x(axes, xs, log_x, counts)
        _style_axes(axes, x, y)
        keys = [
            legend_key(curve.name, curve.color, "solid" if curve.strong else "dashed", len(xs) <= MANY)
            for curve, (xs, _) in zip(curves, shown, strict=True)
            if curve.name
        ]
        return Chart(_inline_svg(figure, label), keys)


def bar_plot(
    bars: Mapping[str, Sequence[float | None]],
    label: str,
    *,
    color: int = 0,
    names: Sequence[str] = (),
    x: str = "",
    y: str = "",
    log: bool = False,
    level: tuple[float, str] | None = None,
    horizontal: bool = False,
    size: tuple[float, float] = SIZE,
) -> Chart:
    """Plot groups of bars side by side.

    Args:
        bars: name in the legend ("" for none) -> one value per group; None draws no bar.
        label: text for screen readers; charts of one page need different labels.
        color: index of the first color.
        names: names of the groups; by default they are numbered from 0.
        x: name of the axis of the groups.
        y: name of the axis of the values.
        log: use a logarithmic axis of values and skip bars of 0 or less.
        level: (value, short text) of a line across, such as a limit.
        horizontal: draw horizontal bars, for long names, the first on top.
        size: in inches.
    """
    with _figure(label, size) as (figure, axes):
        drawn, width = [] if level is None else [level[0]], 0.8 / max(len(bars), 1)
        for number, values in enumerate(bars.values()):
            heights = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
            centers = np.arange(len(heights)) + (number - (len(bars) - 1) / 2) * width
            shown = np.isfinite(heights) & ((heights > 0) | (not log))
            drawn += heights[shown].tolist()
            style: Any = {"color": COLORS[(color + number) % len(COLORS)], "linewidth": 0}
            if shown.any():
                draw = axes.barh if horizontal else axes.bar
                draw(centers[shown], heights[shown], width, **style)
        _scale_values(axes, drawn, log, horizontal)
        if level is not None:
            _draw_level(axes, *level, vertical=horizontal)
        _name_groups(axes, max(map(len, bars.values()), default=0), names, horizontal)
        _style_axes(axes, *((y, x, "x") if horizontal else (x, y, "y")))
        keys = [legend_key(name, color + number, line="") for number, name in enumerate(bars) if name]
        return Chart(_inline_svg(figure, label), keys)


@contextmanager
def _figure(label: str, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes, under the settings that it must also be saved with."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,  # keeps the ids of charts on one page apart
        "font.family": "DejaVu Sans",  # ships with matplotlib; the page replaces it
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot()


def _finite_points(
    points: Sequence[tuple[float, float]], log_x: bool, log_y: bool
) -> tuple[np.ndarray, np.ndarray]:
    table = np.array([(a, b) for a, b in points if a is not None and b is not None], dtype=np.float64)
    x, y = table.reshape(-1, 2).T
    kept = np.isfinite(x) & np.isfinite(y) & ((x > 0) | (not log_x)) & ((y > 0) | (not log_y))
    return x[kept], y[kept]


def _draw_curve(axes: Any, curve: Curve, x: np.ndarray, y: np.ndarray) -> None:
    color, marker = COLORS[curve.color % len(COLORS)], _MARKERS[curve.color % len(_MARKERS)]
    if len(x) > MANY:
        axes.plot(*_thin(x, y), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*_thin(x, _running_mean(y)), color=color, linewidth=1.6)
    elif curve.strong:
        axes.plot(x, y, color=color, marker=marker, linewidth=1.7, markersize=3.6)
    else:
        axes.plot(x, y, color=color, marker=marker, linewidth=1.1, markersize=3, linestyle=(0, (4, 2)))


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest point of each stretch, so that no spike is lost."""
    if len(x) <= MOST_POINTS:
        return x, y
    cuts = np.linspace(0, len(x), MOST_POINTS // 2 + 1).astype(int)
    kept = np.unique(
        [lo + at for lo, hi in itertools.pairwise(cuts) for at in (y[lo:hi].argmin(), y[lo:hi].argmax())]
    )
    return x[kept], y[kept]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centered mean over about a thirtieth of the points; windows are cut at the ends."""
    half = max(len(values) // 60, 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _draw_level(axes: Any, value: float, text: str, vertical: bool) -> None:
    """A dashed line across the chart, with a text at its end."""
    style: Any = {"color": INK, "linewidth": 0.9, "linestyle": (0, (2, 2))}
    if vertical:
        axes.axvline(value, **style)
        at, align, transform = (value, 1.0), ("center", "bottom"), axes.get_xaxis_transform()
    else:
        axes.axhline(value, **style)
        at, align, transform = (1.01, value), ("left", "center"), axes.get_yaxis_transform()
    axes.text(*at, text, color=INK, fontsize=8, ha=align[0], va=align[1], transform=transform)


def _scale_y(axes: Any, low: float, high: float, log: bool | None) -> None:
    if log or (log is None and low > 0 and high / low > 20):
        axes.set_yscale("log")
    elif high - low <= 1e-6 * max(abs(low), abs(high)):  # a running mean of equal numbers has rounding errors
        axes.set_ylim(low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1))


def _scale_x(axes: Any, values: np.ndarray, log: bool, counts: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.set_xscale("log")
        few = float(values.max()) / float(values.min()) < 300  # few decades need ticks between them
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif counts:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _scale_values(axes: Any, values: Sequence[float], log: bool, horizontal: bool) -> None:
    """A line at 0 or a logarithmic axis, with space around equal values."""
    set_limits = axes.set_xlim if horizontal else axes.set_ylim
    positive = [value for value in values if value > 0]
    if log and positive:
        (axes.set_xscale if horizontal else axes.set_yscale)("log")
        set_limits(min(positive) / 1.6, max(positive) * 1.6)
    elif not log:
        (axes.axvline if horizontal else axes.axhline)(0, color=LINE, linewidth=1.2, zorder=0)
    if not any(values):
        set_limits(-1, 1)


def _name_groups(axes: Any, count: int, names: Sequence[str], horizontal: bool) -> None:
    """A name or number for each group; every second, fourth, ... number if there are many."""
    step = 1 if names else next(step for step in (1, 2, 4, 8, 16, 32, 64, 10**9) if count / step <= 17)
    shown = range(0, count, step)
    (axes.yaxis if horizontal else axes.xaxis).set_ticks(
        shown, [names[at] if names else str(at) for at in shown]
    )
    if horizontal and count:
        axes.set_ylim(count - 0.4, -0.6)
    elif count > 1:
        axes.set_xlim(-0.6, count - 0.4)


def _style_axes(axes: Any, x: str, y: str, grid: str = "both") -> None:
    """Names of the axes, a light grid, no frame."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=LINE, linewidth=0.8)
    axes.tick_params(colors=INK, which="both", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)


def _inline_svg(figure: Any, label: str) -> Markup:
    """The `<svg>` element alone: scalable, labelled, in the page's colors, with the ids it uses."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    # a <style> element would style the page
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    head, rest = svg[svg.index("<svg") :].split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    for placeholder, color in _THEME.items():
        rest = rest.replace(placeholder, color)
    rest = rest.replace("xlink:href", "href").strip()
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", rest)
    return Markup(f'<svg {view[0] if view else ""} role="img" aria-label="{escape(label)}">{rest}')
