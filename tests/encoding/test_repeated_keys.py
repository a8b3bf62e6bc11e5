"""Repeated keys are refused where files are named after keys; elsewhere every sample counts."""

from __future__ import annotations

import numpy as np
import pytest
from latent_writer import make_samples, write_output
from PIL import Image

from latentae import encode
from latentae.encoding.decode import decode
from latentae.encoding.formats import write
from latentae.errors import DataError, OutputError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig


@pytest.fixture(scope="module")
def f8(tmp_path_factory):
    """The smallest model that kohya's layout takes."""
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=False,
        sample_size=16,
    )
    folder = tmp_path_factory.mktemp("f8") / "model"
    AutoencoderKL(config).save_pretrained(folder)
    return folder


@pytest.fixture
def repeated(write_tar, jpeg, tmp_path):
    """Two shards that both number their samples from 0."""
    for shard in range(2):
        write_tar(
            tmp_path / "shards" / f"{shard}.tar",
            {f"{key:04}.jpg": jpeg(9 * shard + key, 17, 18) for key in range(3)},
        )
    return tmp_path / "shards"


def test_kohya_refuses_keys_of_several_shards_before_encoding(f8, repeated, tmp_path):
    with pytest.raises(
        OutputError,
        match=r"sample '0000' of .*0\.tar and sample '0000' of .*1\.tar would both be written to '0000_",
    ):
        encode(f8, repeated, tmp_path / "out", format="kohya", device="cpu")
    assert not (tmp_path / "out").exists()


def test_kohya_refuses_keys_of_several_shards_before_writing(tmp_path):
    made = make_samples(3)
    folder = write_output(tmp_path / "latents", {"a.tar": made, "b.tar": made})
    with pytest.raises(
        OutputError, match=r"sample 'photos/0000' of a\.tar and sample 'photos/0000' of b\.tar would both"
    ):
        write("kohya", folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_kohya_refuses_names_that_are_too_long_before_encoding(f8, write_tar, jpeg, tmp_path):
    write_tar(tmp_path / "a.tar", {f"{'x' * 240}.jpg": jpeg(0, 17, 18)})
    with pytest.raises(OutputError, match=r"needs a file name of 259 bytes, .* takes 255; shorten its name"):
        encode(f8, tmp_path / "a.tar", tmp_path / "out", format="kohya", device="cpu")


def test_kohya_has_the_names_of_the_images(tmp_path):
    made = make_samples(3, images=True)
    made[0].key, made[1].key, made[2].key = (
        "deep/my%20cat%2Ev2",
        "100%25",
        "my%41cat",
    )  # the last is of another writer
    out = write("kohya", write_output(tmp_path / "latents", {"a.tar": made}), tmp_path / "out")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {"latentae.json"} | {
        name
        for stem, one in zip(("deep/my cat.v2", "100%", "my%41cat"), made, strict=True)
        for name in (
            f"{stem}_{one.info['original_size'][1]:04}x{one.info['original_size'][0]:04}_sd.npz",
            f"{stem}.png",
            f"{stem}.txt",
        )
    }


def test_kohya_refuses_a_key_that_leaves_the_folder(tmp_path):
    made = make_samples(1)
    made[0].key = "%2E%2E/x"
    with pytest.raises(OutputError, match=r"can't be written as the file '\.\./x_"):
        write("kohya", write_output(tmp_path / "latents", {"a.tar": made}), tmp_path / "out")


def test_decode_shows_every_sample_of_a_key(model, repeated, tmp_path, capsys):
    out = tmp_path / "out"
    encode(model, repeated, out, resolution=16, keep_images=True, device="cpu")
    result = decode(out, ["0001", "0000"], model=model, device="cpu", file=tmp_path / "grid.png")
    assert (
        result["keys"]
        == ["0001 of 0.tar", "0001 of 1.tar", "0000 of 0.tar", "0000 of 1.tar"]
        == list(result["psnr"])
    )
    assert "2 shards have a sample 0001; all are shown" in capsys.readouterr().err
    tiles = np.asarray(Image.open(tmp_path / "grid.png")).shape[1] // 20
    assert tiles == 4
    assert len(decode(out, model=model, device="cpu", file=tmp_path / "grid.png")["keys"]) == 6
    with pytest.raises(DataError, match="no sample '7'"):
        decode(out, ["0001", "7"], model=model, device="cpu", file=tmp_path / "grid.png")
