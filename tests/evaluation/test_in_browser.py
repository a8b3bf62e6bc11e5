from __future__ import annotations

import json
import shutil

import pytest
from browser import find_browser, load
from made_result import add_pictures, full_result, missing_result

from latentae.evaluation.compare import compare
from latentae.evaluation.report import write_evaluation_report

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="needs Chromium or Chrome, which is not installed"
)


def write_log(path, factor: float = 1.0, count: int = 60):
    lines = [
        {
            "step": n,
            "images": 8 * n,
            "loss/total": factor / n,
            "loss/kl": 0.5,
            "img_per_s": 60.0,
            "lr": 1e-3,
            "time": 100.0 + n,
        }
        for n in range(1, count)
    ]
    lines += [
        {"step": n, "images": 8 * n, "validation/psnr": 20 + factor * n / 10, "validation/ssim": 0.8}
        for n in (20, 40)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "ima', encoding="utf-8")
    return path


def assert_fits(found, images: int, drawings: int) -> None:
    assert [item["width"] for item in found] == [390, 1280]
    for item in found:
        assert item["problems"] == [], item["width"]
        assert item["images"] >= images
        assert item["drawings"] >= drawings
        assert item["words"] > 50


def test_a_page_with_everything_fits_any_width(evaluation, tmp_path):
    result = add_pictures(tmp_path, full_result(evaluation[1], 24), size=160)
    write_evaluation_report(tmp_path, result, write_log(tmp_path / "metrics.jsonl"))
    assert_fits(load(tmp_path / "report.html", tmp_path / "browser"), images=4 * 8 + 6 * 3 + 3, drawings=12)


def test_a_page_where_everything_is_missing_fits(evaluation, tmp_path):
    write_evaluation_report(tmp_path, missing_result(evaluation[1]))
    assert_fits(load(tmp_path / "report.html", tmp_path / "browser"), images=0, drawings=4)


def test_a_comparison_fits(evaluation, tmp_path):
    for number, name in enumerate(["first", "second-of-them-with-quite-a-long-name"]):
        run = tmp_path / name
        (run / "samples").mkdir(parents=True)
        write_log(run / "metrics.jsonl", 1.0 + number)
        (run / "recipe.toml").write_text(
            f'images = 480\nseed = {number}\n[data]\nshards = "a/very/long/path/to/{number}/{"x" * 60}.tar"\n'
        )
    result = add_pictures(tmp_path / "evaluation", full_result(evaluation[1], 4))
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(result))
    (tmp_path / "evaluation" / "per_image.csv").write_text("key,psnr\na,20.0\nb,21.0\n")
    shutil.copy(
        tmp_path / "evaluation" / "examples" / "flow.png", tmp_path / "first" / "samples" / "00000480.png"
    )
    compare(
        [tmp_path / "first", tmp_path / "second-of-them-with-quite-a-long-name", tmp_path / "evaluation"],
        tmp_path / "compare.html",
    )
    assert_fits(load(tmp_path / "compare.html", tmp_path / "browser"), images=1, drawings=5)


def test_the_browser_finds_what_is_wrong(evaluation, tmp_path):
    write_evaluation_report(tmp_path, missing_result(evaluation[1]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace("How good", "NaN dB")
    wrong = '<img src="data:image/png;base64,AAAA" alt="broken"><div style="width: 3000px">wide</div>'
    wrong += '<svg width="0" height="0"></svg>'
    wrong += "<script>console.error('said'); undefinedFunction();</script>"
    (tmp_path / "report.html").write_text(page.replace("</main>", f"{wrong}</main>"), encoding="utf-8")
    for item in load(tmp_path / "report.html", tmp_path / "browser"):
        problems = " ".join(item["problems"])
        if item["width"]:
            wanted = (
                "image: broken",
                "overflow: 3",
                "empty svg",
                "text: NaN dB",
                "console.error: said",
                "undefinedFunction",
            )
            for problem in wanted:
                assert problem in problems
