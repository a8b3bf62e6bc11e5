"""Tasks that write a file for each image: no two images share a file, and a key of any length has one."""

from __future__ import annotations

import csv

import pytest
from digit_files import pca_model, write_images

from latentae.data.shards import write_shards
from latentae.data.shrinking import encode_png
from latentae.errors import OutputError
from latentae.tasks.anomaly import anomaly
from latentae.tasks.denoise import denoise


@pytest.fixture
def model(digits, tmp_path):
    return pca_model(tmp_path / "model", digits[0][:200], 8)


def test_denoise_refuses_keys_of_several_shards_before_the_work(model, digits, tmp_path):
    for shard in ("a", "b"):
        write_shards(
            ({"__key__": str(n), "png": encode_png(digits[0][n])} for n in range(3)), tmp_path / shard
        )
    given = [tmp_path / "a" / "000000.tar", tmp_path / "b" / "000000.tar"]
    message = r"image 0 in .*a/000000\.tar and image 0 in .*b/000000\.tar would both be written to '0\.png'"
    with pytest.raises(OutputError, match=message):
        denoise(model, given, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()
    assert denoise(model, given[:1], tmp_path / "out", device="cpu")["images"] == 3


def test_denoise_refuses_names_that_are_too_long_before_the_work(model, digits, tmp_path):
    write_shards([{"__key__": "x" * 252, "png": encode_png(digits[0][0])}], tmp_path / "shards")
    with pytest.raises(OutputError, match="needs a file name of 256 bytes"):
        denoise(model, tmp_path / "shards", tmp_path / "out", device="cpu")


def test_a_heat_map_of_a_long_key_has_a_shorter_name(model, digits, tmp_path):
    normal = write_images(tmp_path / "normal", digits[0][:40])
    keys = [f"{'deep/' * 60}{n}" for n in range(2)]
    write_shards(
        ({"__key__": key, "png": encode_png(digits[0][50 + n])} for n, key in enumerate(keys)),
        tmp_path / "shards",
    )
    anomaly(model, normal, tmp_path / "shards", tmp_path / "out", heat_maps=2, device="cpu")
    assert len(list((tmp_path / "out" / "heat").glob("*.png"))) == 2
    with (tmp_path / "out" / "scores.csv").open(newline="") as file:
        assert {row["key"] for row in csv.DictReader(file)} == set(keys)
