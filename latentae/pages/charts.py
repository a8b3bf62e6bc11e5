"""Charts as inline SVG in the page's own colours: lines, points and bars, with linear or logarithmic axes.

    svg = line_plot([Curve("run A", points), Curve("run B", points)], "PSNR", x="images seen", y="dB")
    Chart(svg, "PSNR", legend=legend(curves))

Up to eight series have colours of their own that readers with any kind of colour vision can tell apart on light and dark paper (tested);
series of points differ in shape too. Charts are drawn narrow, so that their text can be read on a phone.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

__all__ = ["SERIES", "Bars", "Curve", "Key", "bar_plot", "legend", "line_plot"]

# matplotlib writes colours as literals; these unlikely ones are replaced by the page's own, which know light from dark
INK, LINE = "#010203", "#010204"
SERIES = tuple(f"#0102{number:02x}" for number in range(5, 13))
"""Literals of the eight colours of series; the page's are in report.css."""
_VARIABLES = ("--accent", "--second", *(f"--series-{number}" for number in range(3, 9)))
_LIGHT = ("#2764d8", "#c2571a", "#1c8ea9", "#6e3b49", "#d77e06", "#f72d8e", "#4f3f99", "#5d7e66")
THEME = {INK: "currentColor", LINE: "var(--line, #ccc)"} | {
    literal: f"var({name}, {colour})"
    for literal, name, colour in zip(SERIES, _VARIABLES, _LIGHT, strict=True)
}
MARKERS = "osD^vPXp"  # one for each colour
SIZE, WIDE = (4.2, 2.4), (4.7, 3.1)  # inches; a page gives a wide one more room
MOST_POINTS = 1000  # of a line: more than a screen has pixels for
MANY = 40  # points that are too many to be marked one by one


@dataclass(frozen=True)
class Curve:
    """A series of a line chart.

    Attributes:
        name: in the legend.
        points: (x, y) of each; what is not finite is left out.
        color: which of the eight; later ones begin again.
        strong: a thick line; others are thin and dashed, to stay behind.
        line: whether points are joined.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int = 0
    strong: bool = True
    line: bool = True


@dataclass(frozen=True)
class Bars:
    """A series of a bar chart: its name and one value for each place; None where there is none."""

    name: str
    values: Sequence[float | None]
    color: int = 0


@dataclass(frozen=True)
class Key:
    """A name of a legend and the look that goes with it."""

    name: str
    color: int
    marker: str = "s"
    line: str = ""
    """"", "solid" or "dashed"."""

    def html(self) -> str:
        """A small sign and the name."""
        ink = f"var({_VARIABLES[self.color % len(_VARIABLES)]})"
        dash = ' stroke-dasharray="4 2.5"' if self.line == "dashed" else ""
        line = f'<path d="M0 6H24" fill="none" stroke="{ink}" stroke-width="2"{dash}/>' if self.line else ""
        shape = f'<path d="{_SHAPES[self.marker]}" fill="{ink}"/>' if self.marker else ""
        sign = f'<svg viewBox="0 0 24 12" width="24" height="12" aria-hidden="true">{line}{shape}</svg>'
        return f"<li>{sign}<span>{escape(self.name)}</span></li>"


_SHAPES = {  # around (12, 6)
    "o": "M12 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
    "s": "M8.4 2.4h7.2v7.2H8.4z",
    "D": "M12 1l5 5l-5 5l-5-5z",
    "^": "M12 1.5l4.8 9H7.2z",
    "v": "M12 10.5l4.8-9H7.2z",
    "P": "M10.5 1.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z",
    "X": "M8.8 1.2l3.2 3.2l3.2-3.2l1.6 1.6l-3.2 3.2l3.2 3.2l-1.6 1.6l-3.2-3.2l-3.2 3.2l-1.6-1.6l3.2-3.2l-3.2-3.2z",
    "p": "M12 1l4.8 3.5l-1.8 5.7H9l-1.8-5.7z",
}


def legend(series: Sequence[Curve | Bars]) -> tuple[Key, ...]:
    """What the colours and shapes of a chart's series mean."""
    keys = []
    for item in series:
        if isinstance(item, Bars):
            keys.append(Key(item.name, item.color))
        else:
            marker = MARKERS[item.color % len(MARKERS)] if len(item.points) <= MANY else ""
            keys.append(
                Key(
                    item.name, item.color, marker, ("solid" if item.strong else "dashed") if item.line else ""
                )
            )
    return tuple(keys)


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
    named: bool = False,
    size: tuple[float, float] = SIZE,
) -> str:
    """Lines and points as an inline `<svg>`; long lines are drawn faintly, with their running mean.

    Args:
        curves: at least one point in all.
        label: what screen readers say; charts of one page need different ones.
        x: name of the horizontal axis.
        y: name of the vertical axis.
        log_x: whether the horizontal axis is logarithmic (points at 0 or less are left out).
        log_y: the same of the vertical axis; None takes a logarithm where all values are positive and span more than a factor of 20.
        marks: (x, short text) of vertical lines.
        counts: whether x counts something, such as images: whole numbers, with k and M.
        named: whether the names of the curves stand in the chart, for want of a legend beside it.
        size: in inches.
    """
    drawn = [(curve, *_columns(curve.points, log_x, bool(log_y))) for curve in curves]
    drawn = [item for item in drawn if len(item[1])]
    with _figure(label, size) as (figure, axes, done):
        for curve, xs, ys in drawn:
            _line(axes, curve, xs, ys)
        for at, text in marks:
            axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.text(
                at,
                1.0,
                text,
                color=INK,
                fontsize=8,
                ha="center",
                va="bottom",
                transform=axes.get_xaxis_transform(),
            )
        values = np.concatenate([ys for _, _, ys in drawn]) if drawn else np.ones(1)
        _vertical_scale(axes, float(values.min()), float(values.max()), log_y)
        _horizontal_scale(
            axes, np.concatenate([xs for _, xs, _ in drawn]) if drawn else np.ones(1), log_x, counts
        )
        if named:
            axes.legend(frameon=False, labelcolor=INK, fontsize=8)
        _plain(axes, x, y)
        done(figure)
    return done.svg


def bar_plot(
    series: Sequence[Bars],
    label: str,
    *,
    names: Sequence[str] = (),
    x: str = "",
    y: str = "",
    log: bool = False,
    level: tuple[float, str] | None = None,
    lying: bool = False,
    size: tuple[float, float] = SIZE,
) -> str:
    """Bars beside each other as an inline `<svg>`.

    Args:
        series: equally many values each.
        label: what screen readers say; charts of one page need different ones.
        names: of the places; numbers from 0 when not given.
        x: name of the axis along which the places lie.
        y: name of the axis of values.
        log: whether values are on a logarithmic axis (bars of 0 or less are left out).
        level: (value, short text) of a line across, such as a limit.
        lying: whether bars lie, for long names; the first one on top.
        size: in inches.
    """
    with _figure(label, size) as (figure, axes, done):
        count = max((len(item.values) for item in series), default=0)
        width = 0.8 / max(len(series), 1)
        drawn = [] if level is None else [level[0]]
        for number, item in enumerate(series):
            places = np.arange(len(item.values)) + (number - (len(series) - 1) / 2) * width
            heights = np.array(
                [math.nan if value is None else value for value in item.values], dtype=np.float64
            )
            shown = np.isfinite(heights) & ((heights > 0) | (not log))
            drawn += heights[shown].tolist()
            draw, thick = (axes.barh, {"height": width}) if lying else (axes.bar, {"width": width})
            if shown.any():
                draw(
                    places[shown],
                    heights[shown],
                    **thick,
                    color=SERIES[item.color % len(SERIES)],
                    linewidth=0,
                )
        _value_scale(axes, drawn, log, lying)
        if level is not None:
            _level(axes, *level, lying)
        _places(axes, count, names, lying)
        _plain(axes, y if lying else x, x if lying else y, grid="x" if lying else "y")
        done(figure)
    return done.svg


class _Done:
    """Takes the SVG of a figure before the settings that it was made with end."""

    svg = ""

    def __init__(self, label: str) -> None:
        self.label = label

    def __call__(self, figure: Any) -> None:
        buffer = io.StringIO()
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
        self.svg = _inline(buffer.getvalue(), self.label)


@contextmanager
def _figure(label: str, size: tuple[float, float]) -> Iterator[tuple[Any, Any, _Done]]:
    """One font family that ships with matplotlib; the page replaces it. The salt keeps ids of charts on one page apart."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.family": "DejaVu Sans",
        "font.size": 9,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.add_subplot(), _Done(label)


def _columns(
    points: Sequence[tuple[float, float]], log_x: bool, log_y: bool
) -> tuple[np.ndarray, np.ndarray]:
    """x and y of what can be drawn."""
    table = np.array(
        [(a, b) for a, b in points if a is not None and b is not None], dtype=np.float64
    ).reshape(-1, 2)
    kept = (
        np.isfinite(table).all(axis=1) & ((table[:, 0] > 0) | (not log_x)) & ((table[:, 1] > 0) | (not log_y))
    )
    return table[kept, 0], table[kept, 1]


def _line(axes: Any, curve: Curve, x: np.ndarray, y: np.ndarray) -> None:
    color, marker = SERIES[curve.color % len(SERIES)], MARKERS[curve.color % len(MARKERS)]
    if not curve.line:
        axes.plot(x, y, color=color, linewidth=0, marker=marker, markersize=5 if curve.strong else 4)
    elif len(x) > MANY:
        axes.plot(*_thin(x, y), color=color, alpha=0.25, linewidth=0.8)
        axes.plot(*_thin(x, _smooth(y)), color=color, linewidth=1.6, label=curve.name)
    else:
        look = (
            {"linewidth": 1.7, "markersize": 3.6}
            if curve.strong
            else {"linewidth": 1.1, "markersize": 3, "linestyle": (0, (4, 2))}
        )
        axes.plot(x, y, color=color, marker=marker, label=curve.name, **look)


def _vertical_scale(axes: Any, low: float, high: float, log: bool | None) -> None:
    if log or (log is None and low > 0 and high / low > 20):
        axes.set_yscale("log")
    elif high - low <= 1e-6 * max(
        abs(low), abs(high)
    ):  # a running mean of equal numbers differs in its last digits
        axes.set_ylim(low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1))


def _horizontal_scale(axes: Any, values: np.ndarray, log: bool, counts: bool) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    if log:
        axes.set_xscale("log")
        few = float(values.max()) / float(values.min()) < 300  # decades alone would leave hardly a number
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    elif counts:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))


def _value_scale(axes: Any, values: Sequence[float], log: bool, lying: bool) -> None:
    """A line at 0, or a logarithmic axis, with room around values that are all equal."""
    set_scale, set_limits, line = (
        (axes.set_xscale, axes.set_xlim, axes.axvline)
        if lying
        else (axes.set_yscale, axes.set_ylim, axes.axhline)
    )
    positive = [value for value in values if value > 0]
    if log and positive:
        set_scale("log")
        set_limits(min(positive) / 1.6, max(positive) * 1.6)
    elif not log:
        line(0, color=LINE, linewidth=1.2, zorder=0)
    if not any(values):
        set_limits(-1, 1)


def _level(axes: Any, value: float, text: str, lying: bool) -> None:
    draw, transform = (
        (axes.axvline, axes.get_xaxis_transform()) if lying else (axes.axhline, axes.get_yaxis_transform())
    )
    draw(value, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
    place: tuple[float, float, str, str] = (
        (value, 1.0, "center", "bottom") if lying else (1.01, value, "left", "center")
    )
    axes.text(*place[:2], text, color=INK, fontsize=8, ha=place[2], va=place[3], transform=transform)


def _places(axes: Any, count: int, names: Sequence[str], lying: bool) -> None:
    """A name or number for each place, for every so many where there are many."""
    axis = axes.yaxis if lying else axes.xaxis
    step = 1 if names else next(step for step in (1, 2, 4, 8, 16, 32, 64, 10**9) if count / step <= 17)
    places = list(range(0, count, step))
    axis.set_ticks(places, [names[place] if names else str(place) for place in places])
    if (count and lying) or count > 1:
        (axes.set_ylim if lying else axes.set_xlim)(*((count - 0.4, -0.6) if lying else (-0.6, count - 0.4)))


def _plain(axes: Any, x: str, y: str, grid: str = "both") -> None:
    """Names of axes, a light grid, no frame."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.set_axisbelow(True)
    axes.grid(axis=grid, color=LINE, linewidth=0.8)
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
    """The `<svg>` element alone, scalable, in the page's colours, with a name for screen readers and only the ids it needs."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL
    )  # it would style the page
    head, rest = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    for literal, themed in THEME.items():
        rest = rest.replace(literal, themed)
    rest = rest.replace("xlink:href", "href").strip()
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', rest))
    rest = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", rest)
    return f'<svg {view.group(0) if view else ""} role="img" aria-label="{escape(label)}">{rest}'
