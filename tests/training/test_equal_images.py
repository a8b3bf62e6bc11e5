"""Images that are all one color have no variance: nothing divides by it."""

from __future__ import annotations

import json

import pytest
import torch

from latentae.data.shards import write_shards
from latentae.data.shrinking import encode_png
from latentae.training.init import init
from latentae.training.train import train

OPTIONS = {
    "data.resolution": 16,
    "data.validation_fraction": 0.5,
    "batch_size": 2,
    "images": 4,
    "log.summary": True,
}


@pytest.fixture
def one_color(tmp_path):
    image = encode_png(torch.full((3, 16, 16), 200, dtype=torch.uint8))
    write_shards(({"__key__": f"{index:02}", "png": image} for index in range(16)), tmp_path / "shards")
    return tmp_path / "shards"


def test_init_keeps_all_of_no_variance(narrow, one_color, tmp_path):
    report = init(narrow(**OPTIONS), one_color, tmp_path / "start")
    assert report["explained"] == 1.0
    assert report == json.loads((tmp_path / "start" / "head_start.json").read_text())
    assert report["pca_psnr"] is None  # every image is exact


def test_train_from_it_ends(narrow, one_color, tmp_path):
    run = train(narrow(**OPTIONS, **{"data.shards": str(one_color)}), tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss/total"] < 1e-3 for line in lines if "loss/total" in line)
    assert (run / "summary.html").exists()
