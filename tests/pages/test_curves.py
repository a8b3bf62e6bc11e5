from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from latentae.errors import DataError
from latentae.pages.curves import chart, line_chart, read_log, training_charts


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
    assert read_log(log) == {"loss/total": [(8.0, 2.0), (16.0, 1.25)], "validation/psnr": [(16.0, 20.0)]}
    assert [chart.title for chart in training_charts(log)] == ["Validation: PSNR", "Loss: total"]


@pytest.mark.parametrize("count", [1, 30, 500])
def test_a_chart_is_one_svg_in_the_pages_colours(count):
    svg = line_chart([(8.0 * i, 1000.0 / (i + 1)) for i in range(count)], 'loss/<"total">')
    assert ElementTree.fromstring(svg).tag == "svg"
    assert "#01020" not in svg
    assert "var(--accent" in svg
    assert "http" not in svg


def test_two_lines_have_names_and_marks_have_texts():
    lines = {"real": [(0.0, 1.0), (8.0, 2.0)], "fake": [(0.0, -1.0), (8.0, -2.0)]}
    svg = chart(lines, "logits", [(4.0, "D")])
    assert ElementTree.fromstring(svg).tag == "svg"
    for wanted in (">real<", ">fake<", ">D<", "var(--second"):
        assert wanted in svg
    assert "var(--second" not in line_chart(lines["real"], "one")


def test_any_numbers_of_a_log_can_be_asked_for_and_a_missing_log_is_one_line(tmp_path):
    log = write_log(
        tmp_path / "metrics.jsonl", [{"step": 1, "images": 8, "lr": 0.1, "loss/total": None, "note": "text"}]
    )
    assert read_log(log, ("",)) == {"step": [(8.0, 1.0)], "images": [(8.0, 8.0)], "lr": [(8.0, 0.1)]}
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_log(tmp_path / "none.jsonl")
