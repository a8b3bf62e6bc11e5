from __future__ import annotations

import json

import pytest

from latentae import encode
from latentae.data import decode as decoding
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import ImageError, OutputError


@pytest.fixture
def large(write_tar, jpeg, tmp_path, monkeypatch):
    """A shard with one large photo."""
    monkeypatch.setattr(decoding, "LARGE", 160 * 240 - 1)
    write_tar(tmp_path / "shards" / "a.tar", {"x.jpg": jpeg(0, 160, 240)})
    return tmp_path / "shards"


def test_a_large_photo_is_encoded_from_a_reduced_decode_and_keeps_its_size_on_record(
    model, large, tmp_path, monkeypatch
):
    encode(model, large, tmp_path / "reduced", resolution=16, dtype="fp32", keep_images=True, device="cpu")
    monkeypatch.setattr(decoding, "LARGE", 160 * 240)
    encode(model, large, tmp_path / "full", resolution=16, dtype="fp32", keep_images=True, device="cpu")
    reduced, full = (LatentDataset(tmp_path / name) for name in ("reduced", "full"))
    assert reduced.meta(0)["latent.json"] == full.meta(0)["latent.json"]
    assert reduced.meta(0)["latent.json"]["original_size"] == [160, 240]
    difference = (reduced[0].mean - full[0].mean).abs().max()
    assert 0 < difference < 0.1 * full[0].mean.abs().max()


def test_the_limit_is_part_of_the_job_only_where_it_was_given(model, large, tmp_path):
    encode(model, large, tmp_path / "out", resolution=16, device="cpu")
    assert "max_pixels" not in json.loads((tmp_path / "out" / "latentae.json").read_text())["inputs"]
    with pytest.raises(OutputError, match="max_pixels was not set and is now 1000000"):
        encode(model, large, tmp_path / "out", resolution=16, max_pixels=1_000_000, device="cpu")
    with pytest.raises(ImageError, match=r"1 of 1 images are unreadable .*above the limit"):
        encode(model, large, tmp_path / "small", resolution=16, max_pixels=1000, device="cpu")
