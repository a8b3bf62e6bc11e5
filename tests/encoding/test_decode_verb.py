from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from latentae.data.shard_files import read_shard
from latentae.data.transforms import resize_and_center_crop, to_float, to_uint8
from latentae.encoding.decode import decode
from latentae.encoding.store import open_store
from latentae.errors import DataError, ImageError, ModelError, OutputError
from latentae.measures.metrics import psnr
from latentae.models.pretrained import load_model

KEYS = ["photos/0007", "photos/0002", "photos/0005"]
SIDE, GAP = 32, 4


def tiles(file: Path) -> np.ndarray:
    """The grid's images, [rows, columns, H, W, 3]."""
    picture = np.asarray(Image.open(file))
    step = SIDE + GAP
    rows, columns = ((side - GAP) // step for side in picture.shape[:2])
    cells = picture[GAP:, GAP:][: rows * step, : columns * step]
    padded = np.pad(cells, ((0, rows * step - len(cells)), (0, columns * step - cells.shape[1]), (0, 0)))
    return padded.reshape(rows, step, columns, step, 3).swapaxes(1, 2)[:, :, :SIDE, :SIDE]


def originals(photos: Path) -> dict[str, torch.Tensor]:
    from latentae.data.decode import decode_sample

    samples = [raw for path in sorted(photos.glob("*.tar")) for raw in read_shard(path)]
    return {str(raw["__key__"]): resize_and_center_crop(decode_sample(raw).image, SIDE) for raw in samples}


@pytest.mark.parametrize("remote", [False, True])
def test_latents_are_right(remote: bool, kept: Path, model: Path, photos: Path, tmp_path: Path) -> None:
    out = f"memory://{uuid.uuid4().hex}" if remote else str(kept)
    if remote:
        fsspec.filesystem("memory").put(f"{kept}/", f"{out}/", recursive=True)
    result = decode(out, KEYS, model=model, device="cpu", file=tmp_path / "grid.png")
    assert result["keys"] == KEYS
    grid = tiles(tmp_path / "grid.png")
    assert grid.shape == (3, 3, SIDE, SIDE, 3)
    network, _ = load_model(model)
    for column, key in enumerate(KEYS):
        image = originals(photos)[key]
        np.testing.assert_array_equal(grid[0, column], image.permute(1, 2, 0))
        for row, seen in ((1, image), (2, image.flip(2))):
            with torch.inference_mode():
                again = to_uint8(network.decode(network.encode(to_float(seen[None])).mode()))
            assert psnr(again, torch.from_numpy(grid[row, column].copy()).permute(2, 0, 1)[None]) > 50
            if row == 1:
                assert result["psnr"][key] == pytest.approx(float(psnr(again, image[None])), abs=0.05)


def test_without_keys_and_images(encoded: Path, model: Path, tmp_path: Path) -> None:
    result = decode(encoded, model=model, device="cpu", file=tmp_path / "grid.png")
    assert result["keys"] == [f"photos/{number:04}" for number in range(8)]
    assert result["psnr"] == {}
    assert tiles(tmp_path / "grid.png").shape == (1, 8, SIDE, SIDE, 3)


def test_of_an_output_that_is_not_finished(encoded: Path, model: Path, tmp_path: Path) -> None:
    out = shutil.copytree(encoded, tmp_path / "out")
    for path in out.glob("*.done.json"):
        if not path.name.startswith("train-003"):
            path.unlink()
    open_store(out).claim("encode", open_store(out).record()["inputs"]).reopen()
    assert decode(out, model=model, device="cpu", file=tmp_path / "grid.png")["keys"][0] == "photos/0006"
    (out / "train-003.tar.done.json").unlink()
    with pytest.raises(DataError, match="no latents are finished"):
        decode(out, model=model, device="cpu", file=tmp_path / "grid.png")


def test_the_model_is_found_where_it_was(encoded: Path, model: Path, tmp_path: Path) -> None:
    out = shutil.copytree(encoded, tmp_path / "out")
    store = open_store(out)
    job = store.claim("encode", store.record()["inputs"], {"model_path": str(model)})
    job.finish()
    decode(out, ["photos/0001"], device="cpu", file=tmp_path / "grid.png")
    store.claim("encode", store.record()["inputs"], {}).finish()
    with pytest.raises(ModelError, match="does not record the path of its model"):
        decode(out, device="cpu", file=tmp_path / "grid.png")


def test_what_can_not_be_shown_is_refused_in_one_line(
    encoded: Path, model: Path, make_model, tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="is not the model that") as caught:
        decode(encoded, model=other, device="cpu", file=tmp_path / "grid.png")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grid.png").exists()
    with pytest.raises(DataError, match="no sample 'photos/9999'"):
        decode(encoded, ["photos/0001", "photos/9999"], model=model, device="cpu", file=tmp_path / "grid.png")
    with pytest.raises(ImageError, match=r"ends in \.png"):
        decode(encoded, model=model, device="cpu", file=tmp_path / "grid.jpg")
    with pytest.raises(OutputError):
        decode(tmp_path, model=model, device="cpu", file=tmp_path / "grid.png")
