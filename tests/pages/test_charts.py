from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ElementTree
from importlib import resources

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.pages.charts import COLORS, Chart, Curve, bar_plot, line_plot

# protanopia, deuteranopia and tritanopia in linear RGB (Machado et al. 2009, table 1, severity 1)
BLINDNESS = [
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
]


def linear(color: str) -> np.ndarray:
    channels = np.array([int(color[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson 2020."""
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.array(lab) @ np.cbrt(np.clip(cones @ rgb, 0, None))


def contrast(a: str, b: str) -> float:
    """WCAG 2.2."""
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(color)) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


def palettes() -> dict[str, tuple[str, list[str]]]:
    """Background and colors of the series, on light and dark paper, as the style sheet has them."""
    css = resources.files("latentae.pages").joinpath("templates", "page.css").read_text(encoding="utf-8")
    names = ["accent", "second", *(f"series-{number}" for number in range(3, 9))]
    found = {name: re.findall(rf"--{name}: (#\w+);", css) for name in ["card", *names]}
    return {
        mode: (found["card"][index].ljust(7, "f"), [found[name][index] for name in names])
        for index, mode in enumerate(("light", "dark"))
    }


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_all_eight_colors_can_be_told_apart_by_all_eyes(mode):
    paper, colors = palettes()[mode]
    assert len(colors) == len(COLORS) == 8
    assert all(contrast(color, paper) >= 3 for color in colors)
    views = [np.eye(3), *map(np.array, BLINDNESS)]
    for a, b in itertools.combinations(colors, 2):
        for view in views:
            seen = [oklab(np.clip(view @ linear(color), 0, 1)) for color in (a, b)]
            assert np.linalg.norm(seen[0] - seen[1]) > 0.05, (a, b)


def parsed(chart: Chart) -> ElementTree.Element:
    svg = chart.svg
    assert "#0102" not in svg
    assert "http" not in svg
    assert not re.search(r"\b(nan|inf)\b", svg)
    ids = re.findall(r' id="([^"]+)"', svg)
    assert set(ids) == set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    return root


numbers = st.one_of(
    st.none(), st.sampled_from([0.0, -1.0, 1e-9, 1e9, math.nan, math.inf, -math.inf]), st.floats(-1e6, 1e6)
)
points = st.lists(st.tuples(numbers, numbers), max_size=6)


@settings(max_examples=12, deadline=None)
@given(lines=st.lists(points, max_size=3), log_x=st.booleans(), log_y=st.sampled_from([None, True, False]))
def test_any_points_make_a_chart(lines, log_x, log_y):
    curves = [Curve(f"<{number}>", line, number, strong=number == 0) for number, line in enumerate(lines)]
    parsed(line_plot(curves, "any", x="a < b", y="c & d", log_x=log_x, log_y=log_y))


@settings(max_examples=12, deadline=None)
@given(
    values=st.lists(numbers, max_size=20), log=st.booleans(), horizontal=st.booleans(), named=st.booleans()
)
def test_any_values_make_bars(values, log, horizontal, named):
    names = [f"stage {number}" for number in range(len(values))] if named else []
    bars, level = {"a": values, "b": values}, (0.01, "limit")
    parsed(bar_plot(bars, "any", names=names, log=log, horizontal=horizontal, level=level))


def drawn(chart: Chart, color: int) -> list[str]:
    variable = ("--accent", "--second", *(f"--series-{number}" for number in range(3, 9)))[color]
    return re.findall(rf'<path d="([^"]*)"[^>]*style="[^"]*var\({variable}', chart.svg)


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"(-?[\d.]+) (-?[\d.]+)", path)]


def test_eight_curves_have_eight_colors_and_the_ninth_begins_again():
    curves = [Curve(f"run {number}", [(0.0, number), (1.0, number + 1.0)], number) for number in range(9)]
    chart = line_plot(curves, "many")
    assert chart == line_plot(curves, "many")  # to the byte
    assert all(drawn(chart, color) for color in range(8))
    without_style_sheet = dict.fromkeys(
        re.findall(r"var\(--(?:accent|second|series-\d), (#\w+)\)", chart.svg)
    )
    assert list(without_style_sheet) == palettes()["light"][1]
    looks = [(key["color"], key["shape"]) for key in chart.legend]
    assert len(set(looks)) == 8
    assert looks[8] == looks[0]


def test_bars_have_the_heights_of_their_values():
    paths = drawn(bar_plot({"": [1.0, 2.0, None, -1.0]}, "bars"), 0)
    ys = [[y for _, y in places(path)] for path in paths]
    heights = [max(row) - min(row) for row in ys]
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 1], rel=1e-3)


def test_a_logarithmic_axis_is_even_in_ratios():
    chart = line_plot([Curve("", [(0.05, 1.0), (0.5, 2.0), (5.0, 3.0), (0.0, 9.0)])], "log", log_x=True)
    xs = [x for x, _ in places(next(path for path in drawn(chart, 0) if path.count("L") == 2))]
    assert len(xs) == 3  # 0 has no place on it
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], rel=1e-3)


def test_a_long_run_makes_no_large_chart_and_loses_no_spike():
    chart = line_plot(
        [Curve("", [(float(x), 9.0 if x == 123_457 else x % 2) for x in range(200_000)])], "long"
    )
    assert len(chart.svg) < 60_000
    ys = [y for path in drawn(chart, 0) for _, y in places(path)]
    assert 100 < len(ys) < 2500
    assert min(ys) < sorted(ys)[1] - 30  # one point is far above all others


def test_a_legend_shows_what_is_drawn():
    points = [(0.0, 1.0)]
    curves = [Curve("model", points), Curve("jpeg", points, 1, strong=False), Curve("", points, 2)]
    strong, dashed = line_plot(curves, "legend").legend
    assert (strong["name"], strong["line"], dashed["line"]) == ("model", "solid", "dashed")
    (dense,) = line_plot([Curve("long", [(float(x), 1.0) for x in range(100)])], "dense").legend
    assert not dense["shape"]  # no markers on a long line
    (bars,) = bar_plot({"bars": [1.0]}, "bars").legend
    assert bars["shape"]
    assert not bars["line"]
