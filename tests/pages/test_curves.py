from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from latentae.errors import DataError
from latentae.pages.curves import curve_chart, curve_title, read_log, run_speed


def write_log(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_log_is_read_as_series_over_images_seen(tmp_path):
    log = write_log(
        tmp_path / "metrics.jsonl",
        [
            {"step": 1, "images": 8, "lr": 0.1, "loss/total": 2.0},
            {"step": 2, "images": 16, "loss/total": 1.5, "loss/kl": float("nan")},
            {"step": 2, "images": 16, "validation/psnr": 20.0},
            {"step": 2, "images": 16, "loss/total": 1.25},  # a resumed run wrote this step again
            '{"step": 3, "images": 24, "loss/to',  # cut short by a crash
        ],
    )
    found = read_log(log)
    assert found["loss/total"] == [(8.0, 2.0), (16.0, 1.25)]
    assert found["validation/psnr"] == [(16.0, 20.0)]
    assert found["lr"] == [(8.0, 0.1)]
    assert "loss/kl" not in found


@pytest.mark.parametrize("count", [1, 30, 500])
def test_a_chart_is_one_svg_in_the_colors_of_the_page(count):
    svg = curve_chart({"": [(8.0 * i, 1000.0 / (i + 1)) for i in range(count)]}, 'loss/<"total">').svg
    assert ElementTree.fromstring(svg).tag == "svg"
    assert "#01020" not in svg
    assert "var(--accent" in svg
    assert "http" not in svg


def test_two_lines_have_names_and_marks_have_texts():
    lines = {"real": [(0.0, 1.0), (8.0, 2.0)], "fake": [(0.0, -1.0), (8.0, -2.0)]}
    chart = curve_chart(lines, "logits", [(4.0, "D")])
    assert [key["name"] for key in chart.legend] == ["real", "fake"]
    assert ">D<" in chart.svg
    assert "var(--second" in chart.svg
    assert "var(--second" not in curve_chart({"": lines["real"]}, "one").svg


def test_titles_name_the_quantity():
    names = ["validation/psnr", "loss/total", "gradient_norm/autoencoder", "img_per_s"]
    titles = ["PSNR (dB)", "Total", "Gradient norm: autoencoder", "Images per second"]
    assert [curve_title(name) for name in names] == titles


def test_the_speed_of_a_run_leaves_stops_out():
    speeds = [(10.0, 5.0), (20.0, 2.0), (30.0, 5.0), (40.0, 0.0)]
    series = {"img_per_s": speeds, "time": [(10.0, 100.0), (30.0, 400.0)]}
    expected = {"images_per_second": 5.0, "seconds": 9.0, "wall_seconds": 300.0, "memory_gb": None}
    assert run_speed(series) == expected
    assert run_speed({}) == {}


def test_a_missing_log_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_log(tmp_path / "none.jsonl")
