from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.transforms import resize_and_center_crop, to_float, to_uint8
from latentae.errors import ImageError, ModelError
from latentae.evaluation import reconstruct as module
from latentae.evaluation.reconstruct import reconstruct
from latentae.measures.metrics import psnr
from latentae.models.pretrained import load_model


def save(path, array):
    Image.fromarray(array).save(path)
    return path


@pytest.fixture
def picture(tmp_path, smooth_images):
    return save(
        tmp_path / "photo.png", np.ascontiguousarray(smooth_images(1, 50)[0, :, :41].permute(1, 2, 0).numpy())
    )


def test_originals_stand_over_reconstructions_of_their_own_size(workspace, tmp_path, picture, capsys):
    out = reconstruct(
        workspace / "model", [picture, picture], out=tmp_path / "deep" / "grid.png", device="cpu"
    )
    grid = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1)
    assert grid.shape == (3, 4 + 41 + 4 + 41 + 4, 4 + 50 + 4 + 50 + 4)
    original = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)
    assert torch.equal(grid[:, 4:45, 4:54], original)
    model, _ = load_model(workspace / "model")
    padded = torch.nn.functional.pad(
        to_float(original[None]), (0, 2, 0, 3), mode="reflect"
    )  # to multiples of 4
    with torch.inference_mode():
        expected = to_uint8(model.decode(model.encode(padded).mode()))[..., :41, :50]
    assert torch.equal(grid[:, 49:90, 4:54], expected[0])
    assert f"{psnr(expected, original[None]).item():.2f} dB PSNR at 50 x 41" in capsys.readouterr().out
    reconstruct(workspace / "model", [picture], out=out, resolution=24)
    grid = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1)
    assert torch.equal(grid[:, 4:28, 4:28], resize_and_center_crop(original, 24))


def test_large_and_small_and_gray_images_work(workspace, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "LONGEST_SIDE", 32)
    large = save(tmp_path / "large.png", np.full((20, 80), 7, dtype=np.uint8))
    reconstruct(workspace / "model", [large], out=tmp_path / "grid.png")
    assert "80 x 20 pixels, reduced to 32 x 8" in capsys.readouterr().err
    small = save(tmp_path / "small.png", np.zeros((3, 9, 3), dtype=np.uint8))  # less than a latent pixel
    reconstruct(workspace / "model", [small], out=tmp_path / "grid.png")
    assert np.array(Image.open(tmp_path / "grid.png")).shape == (4 + 3 + 4 + 3 + 4, 4 + 9 + 4, 3)


def test_bad_input_is_one_clear_line_and_writes_nothing(workspace, tmp_path, picture, tiny_model):
    model, out = workspace / "model", tmp_path / "out" / "grid.png"
    (tmp_path / "text.png").write_text("no image")
    for images, match in [
        ([], "no images"),
        ([tmp_path / "gone.png"], r"could not read .*gone\.png"),
        ([picture, tmp_path / "text.png"], r"text\.png"),
        ([tmp_path], "could not read"),
    ]:
        with pytest.raises(ImageError, match=match):
            reconstruct(model, images, out=out)
    with pytest.raises(ImageError, match="multiple of 4"):
        reconstruct(model, [picture], out=out, resolution=30)
    with pytest.raises(ImageError, match=r"\.png"):
        reconstruct(model, [picture], out=tmp_path / "out" / "grid.jpg")
    with pytest.raises(ModelError):
        reconstruct(tmp_path / "nowhere", [picture], out=out)
    broken = tiny_model()
    torch.nn.init.constant_(broken.decoder.conv_out.bias, torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    with pytest.raises(ModelError, match="NaN"):
        reconstruct(tmp_path / "broken", [picture], out=out)
    assert not out.parent.exists()
