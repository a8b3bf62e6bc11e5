"""The page of a run, finished, interrupted or damaged."""

from __future__ import annotations

import json
import math

import pytest
import torch
from page_reader import Page

from latentae.errors import TrainingError
from latentae.pages.images import write_png
from latentae.training.summary import write_summary


def report(images, **more):
    values = {
        "loss/total": 1 / images,
        "lr": 1e-3,
        "img_per_s": 10.0,
        "data_wait": 0.01,
        "memory_gb": 0.5,
        "phase": 0,
    }
    return {"step": images // 8, "images": images, **values, "time": 1000.0 + images, **more}


def validation(images, psnr):
    return {"step": images // 8, "images": images, "validation/psnr": psnr, "validation/ssim": 0.5}


@pytest.fixture
def run(tmp_path, small):
    """A run folder of these lines and events."""

    def make(lines, events=(), finished=False, recipe=None, grids=()):
        folder = tmp_path / "my run"
        (folder / "samples").mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(
            "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        )
        (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (folder / "latentae.json").write_text(json.dumps({"latentae": "1.2.3", "finished": finished}))
        (folder / "recipe.toml").write_text((recipe or small(images=1600)).toml())
        for images in grids:
            write_png(
                folder / "samples" / f"{images:09}.png",
                torch.full((3, 8, 16), images % 256, dtype=torch.uint8),
            )
        return folder

    return make


def event(images, kind, message):
    return {"step": images // 8, "images": images, "kind": kind, "message": message}


def test_a_finished_run(run):
    lines = [report(8 * i) for i in range(1, 201)] + [validation(800, 21.0), validation(1600, 20.5)]
    folder = run(lines, [event(0, "start", "2 processes, CPU, fp32")], finished=True, grids=(800, 1600))
    page = write_summary(folder)
    assert page == folder / "summary.html"
    found = Page(page)
    assert "Finished after 1,600 images." in found.text
    assert "20.50 best 21.00 at 800 images" in found.text
    assert "No warnings, no skipped steps" in found.text
    assert "2 processes, CPU, fp32" in found.text
    assert "3 min 10 images per second" in found.text  # 1600 images at 10 a second
    assert "Last after 1,600 images" in found.text
    assert "First after 800 images" in found.text
    assert sum(address.startswith("data:image/png") for address in found.addresses) == 2
    assert found.tags.count("svg") == 7  # PSNR, SSIM, total, lr, img/s, data wait, memory
    assert "norm_num_groups = 4" in found.text, "the recipe is there"
    assert {"metrics.jsonl", "events.jsonl", "recipe.toml", "samples"} <= set(found.addresses)


def test_an_interrupted_run_with_phases_and_troubles(run, small):
    phases = [
        {"name": "all of it", "images": 800, "loss": {"adversarial": {"weight": 0.5, "start_images": 400}}},
        {"name": "head only", "images": 800, "model": {"train": "decoder-head"}},
        {"name": "never reached", "images": 800},
    ]
    recipe = type(small())(**{**small().model_dump(mode="json", exclude={"images"}), "phases": phases})
    lines = [report(8 * i) for i in range(1, 121)]
    for line in lines[50:]:
        line |= {
            f"discriminator/{name}_{end}": 0.5 for name in ("logits", "accuracy") for end in ("real", "fake")
        }
        line |= {
            "gradient_norm/autoencoder": 1.0,
            "adversarial/ratio": 2.0,
            "something/new": 3.0,
            "other/new": 4.0,
            "skipped_steps": 1,
        }
    events = [event(8 * i, "warning", f"trouble <{i}>") for i in range(100)] + [
        event(900, "rollback", "back to image 800")
    ]
    folder = run(lines, events, recipe=recipe)
    (folder / "bad_samples.jsonl").write_text("{}\n{}\n")
    found = Page(write_summary(folder))
    assert "Not finished: 960 of 2,400 images seen." in found.text
    assert "Problems: 100 warnings, 1 rollback" in found.text
    assert "2 samples could not be read" in found.text
    assert "trouble <99>" in found.text
    assert "trouble <9>" not in found.text
    assert "The last 60 of 101" in found.text
    assert "Dashed: D, the adversarial loss starts; 1, head only begins." in found.text
    assert "phase 2 never reached: 800 images" in found.text
    for title in ("Logits", "Accuracy", "Adaptive ratio: adversarial", "Gradient norm: autoencoder", "New"):
        assert title in found.text
    assert "real fake" in found.text, "both in one chart"
    assert found.section("Other").count("New") == 2, "one title, two charts"
    assert "Nothing was measured on held-out images" in found.text


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [report(8)],
        [{"step": 1, "images": 8, "loss/total": None, "img_per_s": None}],
        [validation(8, math.pi)],
        [report(8), '{"step": 2, "ima'],
        ["not a line\n", "[]\n", '{"step": "x", "images": null}\n'],
    ],
)
def test_any_files_of_a_run_give_a_page(run, lines):
    found = Page(write_summary(run(lines)))
    assert "Not finished" in found.text


def test_a_damaged_recipe_record_and_picture_do_not_stop_it(run):
    folder = run([report(8), report(16)], grids=(8, 16))
    (folder / "recipe.toml").write_text("of another = 'version'\n")
    (folder / "latentae.json").write_text("{")
    (folder / "samples" / "000000016.png").write_bytes(b"half a picture")
    found = Page(write_summary(folder))
    assert "16 images seen." in found.text
    assert "missing or of another version" in found.text
    assert "First after 8 images" in found.text


def test_a_folder_without_a_run_is_one_line(tmp_path):
    with pytest.raises(TrainingError, match="holds no run"):
        write_summary(tmp_path)
