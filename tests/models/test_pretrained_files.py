"""Weights from files of every kind, and files that are refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentae import export
from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig, preset
from latentae.models.ldm import to_ldm

CONFIG = preset("kl-f4", block_out_channels=(32, 32, 64), layers_per_block=1)


@pytest.fixture
def model() -> AutoencoderKL:
    return AutoencoderKL(CONFIG)


def same(path: Path, model: AutoencoderKL) -> bool:
    found, expected = AutoencoderKL.from_pretrained(path).state_dict(), model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("names", ["", "first_stage_model.", "vae.", "diffusers"])
def test_a_lone_file_is_a_model(suffix, names, model, tmp_path):
    state = model.state_dict()
    if names != "diffusers":
        state = {names + key: value for key, value in to_ldm(state, CONFIG).items()}
    file = tmp_path / f"weights{suffix}"
    plain = {key: value.contiguous() for key, value in state.items()}
    save_file(plain, file) if suffix == ".safetensors" else torch.save({"state_dict": plain, "epoch": 3}, file)
    assert same(file, model)


@pytest.mark.parametrize(
    "overrides",
    [
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False, "layers_per_block": 2},
        {"down_block_types": ("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",)},
        {"latent_channels": 16, "in_channels": 1, "out_channels": 1},
    ],
)
def test_the_shape_is_read_from_diffusers_names(overrides, tmp_path, capsys):
    config = CONFIG.model_copy(update=overrides)
    model = AutoencoderKL(config)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "vae.safetensors")
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")
    assert loaded.config == config
    assert "norms taken to have 32 groups" in capsys.readouterr().err


def test_names_of_2023_are_read_without_a_config(model, tmp_path):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for key, value in model.state_dict().items():
        for new, before in old.items():
            key = key.replace(new, before)
        state[key] = value.contiguous()
    save_file(state, tmp_path / "vae.safetensors")
    assert same(tmp_path / "vae.safetensors", model)


def test_a_shape_that_the_tensors_do_not_tell_asks_for_the_config(tmp_path):
    model = AutoencoderKL(preset("tiny"))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "vae.safetensors")
    with pytest.raises(ModelError, match=r"norm_num_groups 32 does not divide; put its config\.json beside it"):
        AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")


class Hostile:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_archive(file: Path, made: Path) -> None:
    torch.save({"state_dict": {"encoder.conv_in.weight": Hostile(made)}}, file)


def hostile_pickle(file: Path, made: Path) -> None:
    file.write_bytes(pickle.dumps({"state_dict": {"encoder.conv_in.weight": Hostile(made)}}))


def truncated(file: Path, made: Path) -> None:
    torch.save(to_ldm(AutoencoderKL(CONFIG).state_dict(), CONFIG), file)
    file.write_bytes(file.read_bytes()[:-1000])


def damaged(file: Path, made: Path) -> None:
    torch.save({"state_dict": torch.zeros(3)}, file)
    content = bytearray(file.read_bytes())
    content[:64] = bytes(64)
    file.write_bytes(bytes(content))


def wrong_architecture(file: Path, made: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, file)


@pytest.mark.parametrize("write", [hostile_archive, hostile_pickle, truncated, damaged, wrong_architecture])
@pytest.mark.parametrize("suffix", [".ckpt", ".bin"])
def test_a_bad_pickle_is_refused_in_one_line_and_runs_nothing(write, suffix, tmp_path):
    file, made = tmp_path / f"model{suffix}", tmp_path / "made"
    write(file, made)
    for use in (AutoencoderKL.from_pretrained, lambda path: export(path, tmp_path / "vae")):
        with pytest.raises(ModelError, match=rf"model\{suffix}") as caught:
            use(file)
        assert "\n" not in str(caught.value)
    assert not made.exists()
    assert not (tmp_path / "vae").exists()
    if write in (hostile_archive, hostile_pickle):  # the file does what it is said to do, for those who load it so
        torch.load(file, weights_only=False) if write is hostile_archive else pickle.loads(file.read_bytes())
        assert made.exists()


def test_bad_safetensors_are_refused_in_one_line(model, tmp_path):
    model.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    good = file.read_bytes()
    for bad in (b"", good[:100], good[:-1], bytes(100) + good[100:], b"\xff" * 8 + good[8:]):
        file.write_bytes(bad)
        with pytest.raises(ModelError, match="is damaged") as caught:
            export(tmp_path / "vae", tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_architecture_name_what_does_not_fit(model, tmp_path):
    model.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if key != "encoder.conv_in.bias"}, file)
    with pytest.raises(ModelError, match=r"lacks encoder\.conv_in\.bias"):
        AutoencoderKL.from_pretrained(tmp_path / "vae")
    save_file({**state, "encoder.extra": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match=r"unknown encoder\.extra"):
        AutoencoderKL.from_pretrained(tmp_path / "vae")
    AutoencoderKLConfig.from_json(tmp_path / "vae/config.json")
    other = (tmp_path / "vae/config.json").read_text().replace('"AutoencoderKL"', '"AsymmetricAutoencoderKL"')
    (tmp_path / "vae/config.json").write_text(other)
    with pytest.raises(ModelError, match="describes a AsymmetricAutoencoderKL"):
        AutoencoderKL.from_pretrained(tmp_path / "vae")


def test_another_kind_of_file_is_no_model(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"photo\.png is no file of weights; expected \.safetensors"):
        AutoencoderKL.from_pretrained(tmp_path / "photo.png")
