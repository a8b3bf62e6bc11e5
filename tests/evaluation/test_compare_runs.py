from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest

from latentae.errors import DataError, OutputError, RecipeError
from latentae.evaluation.compare import compare
from latentae.measures.metrics import bootstrap_mean

RECIPE = """images = {images}
seed = {seed}
[data]
validation = "held-out"
resolution = 32
[loss]
l2 = 1.0
[loss.perceptual]
net = "{net}"
[[phases]]
images = 10
"""


def write_run(folder, *, psnr=(20.0, 24.0, 23.0), seed=0, net="alex", finished=True, extra=""):
    folder.mkdir(parents=True)
    lines = [
        {"loss/total": 1.0 / n, "img_per_s": 5.0, "time": 1000.0 + 4 * n, "memory_gb": 0.5 + n / 10}
        for n in range(1, 4)
    ]
    lines = [{"step": n, "images": 10 * n, **line} for n, line in enumerate(lines, 1)]
    validation = [{"validation/psnr": value, "validation/perceptual": 1 / value} for value in psnr]
    lines += [{"step": n, "images": 10 * n, **line} for n, line in enumerate(validation, 1)]
    log = "\n".join(map(json.dumps, lines))
    (folder / "metrics.jsonl").write_text(
        f'{{"images": "x"}}\nnonsense\n{log}\n{{"step": 4, "ima', encoding="utf-8"
    )
    (folder / "recipe.toml").write_text(RECIPE.format(images=30, seed=seed, net=net) + extra)
    (folder / "latentae.json").write_text(json.dumps({"verb": "train", "finished": finished}))
    return folder


def write_evaluation(folder, model="elsewhere", *, psnr=None, digest="d", net="LPIPS (alex)", extra=()):
    psnr = {"a": 20.0, "b": 21.0, "c": 22.0, "d": 23.5} if psnr is None else psnr
    folder.mkdir(parents=True)
    values = {"psnr": list(psnr.values()), "perceptual": [1 / value for value in psnr.values()]}
    result = {
        "model": {"path": str(model), "parameters": 1000},
        "data": {"images": len(psnr), "digest": digest, "resolution": 32, "channels": 3},
        "metrics": {name: vars(bootstrap_mean(row)) for name, row in values.items()},
        "perceptual": {"name": net},
        "frechet": {"name": "FD-x", "values": {"model": 3.0}},
        "latent": {"shape": [4, 8, 8], "floats_per_pixel": 0.25},
        "baselines": {"latent_8bit": {"bytes_per_image": 100.0}},
    }
    (folder / "metrics.json").write_text(json.dumps(result))
    rows = [f"{key},{value!r},{1 / value!r}" for key, value in psnr.items()]
    (folder / "per_image.csv").write_text("\n".join(["key,psnr,perceptual", *rows, *extra]) + "\n")
    return folder


def test_last_and_best_values_of_runs_and_what_differs_in_their_recipes(tmp_path, capsys):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", psnr=(22.0, 23.0), seed=1, finished=False, extra="[ema]\ndecay = 0.9\n")
    result = compare([a, b], tmp_path / "page.html")
    assert result == json.loads(json.dumps(result, allow_nan=False))
    psnr = next(item for item in result["validation"] if item["metric"] == "psnr")
    assert psnr["values"]["a"] == {"last": 23.0, "images": 30.0, "best": 24.0, "best_images": 20.0}
    assert psnr["values"]["b"] == {"last": 23.0, "images": 20.0, "best": 23.0, "best_images": 20.0}
    assert (psnr["best"], psnr["reason"]) == ("a", None)
    assert result["recipes"] == {
        "differing": [
            {"key": "seed", "values": {"a": 0, "b": 1}},
            {"key": "ema.decay", "values": {"b": 0.9}},
        ],
        "same": 6,
    }
    assert [(item["finished"], item["images"], item["of"]) for item in result["subjects"]] == [
        (True, 30, 30),
        (False, 30, 30),
    ]
    speed = result["training"]["a"]
    assert speed == pytest.approx(
        {"images_per_second": 5.0, "seconds": 6.0, "wall_seconds": 8.0, "memory_gb": 0.8}
    )
    printed = capsys.readouterr()
    assert "24 at 20" in printed.out
    assert "seed, ema.decay" in printed.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for wanted in ("ema.decay", "not set", "Not finished: b", "validation/psnr", "loss/total"):
        assert wanted in page
    for address in re.findall(r'href="([^"#]*)"', page):
        assert address == "data:," or (tmp_path / address).is_file()


def test_runs_that_validated_differently_have_no_best(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", net="vgg", psnr=(25.0,))
    by_name = {item["metric"]: item for item in compare([a, b], tmp_path / "page.html")["validation"]}
    assert by_name["psnr"]["best"] == "b"
    assert by_name["perceptual"]["best"] is None
    assert "loss.perceptual.net" in by_name["perceptual"]["reason"]
    assert "No best run for held-out Perceptual" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_tie_has_no_winner_and_the_page_repeats_to_the_byte(tmp_path):
    """One model validated on two processors differs in the sixth digit."""
    runs, pages = [write_run(tmp_path / "a"), write_run(tmp_path / "b", psnr=(20.0, 24.0001, 23.0))], []
    for _ in range(2):
        assert {item["best"] for item in compare(runs, tmp_path / "page.html")["validation"]} == {None}
        pages.append((tmp_path / "page.html").read_bytes())
    assert pages[0] == pages[1]


def test_evaluations_are_paired_by_key_on_the_images_that_both_have(tmp_path):
    first = {f"k{n}": 20.0 + n % 7 for n in range(40)}
    second = {
        key: value + 0.5 + 0.1 * (number % 3)
        for number, (key, value) in enumerate(reversed(list(first.items())[5:]))
    }
    a = write_evaluation(tmp_path / "a", psnr=first)
    b = write_evaluation(tmp_path / "b", psnr={**second, "other": 90.0})
    result = compare([a, b], tmp_path / "page.html")
    (pair,) = result["paired"]
    assert (pair["first"], pair["second"], pair["images"]) == ("a", "b", 35)
    difference = np.array([second[key] - first[key] for key in first if key in second])
    assert pair["metrics"]["psnr"]["mean"] == pytest.approx(difference.mean())
    assert pair["metrics"]["psnr"]["better"] == "b"
    expected = bootstrap_mean(difference, 0)
    assert (pair["metrics"]["psnr"]["low"], pair["metrics"]["psnr"]["high"]) == pytest.approx(
        (expected.low, expected.high)
    )
    assert result["evaluation"]["metrics"]["psnr"]["best"] == "b"
    assert result["evaluation"]["frechet"] == {"FD-x": {"values": {"a": 3.0, "b": 3.0}, "best": None}}
    assert "PSNR: b beats a by" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_identical_images_are_counted_and_damaged_rows_passed_over(tmp_path):
    values = {"a": math.inf, "b": 21.0, "c": 22.0}
    a = write_evaluation(tmp_path / "a", psnr=values, extra=["broken,x,y", "short"])
    b = write_evaluation(tmp_path / "b", psnr={"a": math.inf, "b": 23.0, "c": math.inf})
    (pair,) = compare([a, b], tmp_path / "page.html")["paired"]
    psnr = pair["metrics"]["psnr"]
    assert (psnr["n"], psnr["infinite"], psnr["mean"]) == (2, 1, 1.0)


def test_evaluations_of_other_images_or_by_another_network_are_shown_but_not_compared(tmp_path):
    a, b = write_evaluation(tmp_path / "a"), write_evaluation(tmp_path / "b", digest="other")
    result = compare([a, b], tmp_path / "page.html")
    assert result["paired"] == [
        {"first": "a", "second": "b", "missing": "the evaluations are of other images (shards differ)"}
    ]
    assert result["evaluation"]["metrics"]["psnr"]["best"] is None
    assert "shards differ" in (tmp_path / "page.html").read_text(encoding="utf-8")
    result = compare([a, write_evaluation(tmp_path / "c", net="LPIPS (vgg)")], tmp_path / "page.html")
    assert set(result["paired"][0]["metrics"]) == {"psnr"}
    none = compare([a, write_evaluation(tmp_path / "d", net=None)], tmp_path / "page.html")
    assert set(none["paired"][0]["metrics"]) == {"psnr"}
    assert result["evaluation"]["metrics"]["perceptual"]["best"] is None


def test_an_evaluation_goes_with_its_run(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", psnr=(21.0,))
    ea, eb = write_evaluation(tmp_path / "ea", a), write_evaluation(tmp_path / "eb", b)
    subjects = compare([a, b, ea, eb], tmp_path / "page.html")["subjects"]
    assert [(item["name"], item["run"], item["evaluation"]) for item in subjects] == [
        ("a", str(a), str(ea)),
        ("b", str(b), str(eb)),
    ]
    assert [item["name"] for item in compare([a, ea], tmp_path / "page.html")["subjects"]] == ["a", "ea"]


def test_folders_of_the_same_name_are_told_apart_and_names_that_would_be_addresses_have_no_links(tmp_path):
    runs = [write_run(tmp_path / parent / "run") for parent in ("x", "javascript:alert")]
    assert [item["name"] for item in compare(runs, tmp_path)["subjects"]] == ["x/run", "javascript:alert/run"]
    assert 'href="javascript' not in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_a_run_that_has_just_begun_or_lost_its_recipe(tmp_path):
    a, b, c = write_run(tmp_path / "a"), tmp_path / "b", write_run(tmp_path / "c")
    b.mkdir()
    (b / "recipe.toml").write_text("images = 100\n")
    (c / "recipe.toml").write_text("images = = 3")
    (c / "latentae.json").write_text("{")
    result = compare([a, b, c], tmp_path / "page.html")
    assert [item["images"] for item in result["subjects"]] == [30, None, 30]
    assert set(result["training"]) == {"a", "c"}
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No readable recipe: c." in page
    assert "Not finished: b, c" in page


def test_mistakes_are_one_line(tmp_path):
    a, out = write_run(tmp_path / "x" / "a"), tmp_path / "page.html"
    b = write_evaluation(tmp_path / "x" / "e")
    with pytest.raises(RecipeError, match="two or more"):
        compare([a], out)
    with pytest.raises(RecipeError, match="given twice"):
        compare([a, a.parent / "." / "a"], out)
    with pytest.raises(DataError, match=r"is no folder"):
        compare([a, tmp_path / "none"], out)
    with pytest.raises(DataError, match=r"neither a run .* did you mean .*x/a or .*x/e"):
        compare([a, tmp_path / "x"], out)
    with pytest.raises(OutputError, match=r"ends in \.html"):
        compare([a, b], tmp_path / "page.txt")
    (b / "metrics.json").write_text("[1]")
    with pytest.raises(DataError, match="evaluate again"):
        compare([a, b], out)
    shutil.rmtree(b)
    b.mkdir()
    (b / "latentae.json").write_text('{"verb": "evaluate"}')
    with pytest.raises(DataError, match="has not finished"):
        compare([a, b], out)
    assert not out.exists()
