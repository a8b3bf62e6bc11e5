"""Files have the permissions that the umask gives, however a library writes them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import latentae
from latentae.files import atomic_file, staged_folder
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import preset
from latentae.models.pretrained import save_weights

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")


@pytest.fixture(params=[0o022, 0o002, 0o077, 0o027], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_is_written_through_a_temporary_file_has_the_modes_of_the_umask(umask, tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        save_weights({"a": torch.zeros(3)}, folder / "deep/weights.safetensors")
        with atomic_file(folder / "text") as temporary:
            temporary.write_text("x")
        with atomic_file(folder / "replaced") as temporary:  # as libraries do that rename a file of their own
            other = temporary.with_suffix(".own")
            os.close(os.open(other, os.O_CREAT | os.O_WRONLY, 0o600))
            other.replace(temporary)
    assert {mode(path) for path in (tmp_path / "out").rglob("*") if path.is_file()} == {0o666 & ~umask}
    assert {mode(path) for path in (tmp_path / "out", tmp_path / "out/deep")} == {0o777 & ~umask}


def test_a_file_that_exists_is_replaced_by_one_with_the_modes_of_the_umask(umask, tmp_path):
    (tmp_path / "weights.safetensors").touch(0o600)
    save_weights({"a": torch.zeros(3)}, tmp_path / "weights.safetensors")
    assert mode(tmp_path / "weights.safetensors") == 0o666 & ~umask


def test_every_file_of_the_verbs_has_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        (tmp_path / "photos").mkdir()
        for number in range(3):
            pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"photos/{number}.png")
        model, shards = tmp_path / "model", tmp_path / "shards"
        AutoencoderKL(preset("tiny-f8", block_out_channels=(8, 8, 8, 8), sample_size=32)).save_pretrained(
            model
        )
        latentae.shards(tmp_path / "photos", shards)
        for name, options in {"plain": {}, "packed": {"packed": True}, "kohya": {"format": "kohya"}}.items():
            latentae.encode(model, shards, tmp_path / name, device="cpu", batch_size=2, **options)
        latentae.features(model, shards, tmp_path / "features", device="cpu")
        latentae.denoise(model, shards, tmp_path / "denoised", device="cpu")
        for name, options in {"vae": {"variant": "fp16"}, "ldm": {"format": "ldm"}}.items():
            latentae.export(model, tmp_path / name, device="cpu", **options)
    finally:
        os.umask(before)
    wrong = [path for path in tmp_path.rglob("*") if mode(path) != (0o755 if path.is_dir() else 0o644)]
    assert not wrong
