"""Weights from files of every type, and files that are refused."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import equal

from latentae import export
from latentae.errors import ModelError
from latentae.files import write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.initialization import load_initial
from latentae.models.ldm import to_ldm
from latentae.models.presets import preset

CONFIG = preset("kl-f4", block_out_channels=(32, 32, 64), layers_per_block=1)


@pytest.fixture
def model() -> AutoencoderKL:
    return AutoencoderKL(CONFIG)


def same(path: Path, model: AutoencoderKL) -> bool:
    return equal(AutoencoderKL.from_pretrained(path), model)


@pytest.mark.parametrize(
    ("suffix", "names"),
    [(".safetensors", ""), (".safetensors", "vae."), (".safetensors", "diffusers"), (".ckpt", ""),
     (".ckpt", "first_stage_model."), (".pth", "vae."), (".pt", "diffusers"), (".bin", "diffusers")],
)  # fmt: skip
def test_a_lone_file_is_a_model(suffix, names, model, tmp_path):
    state = model.state_dict()
    if names != "diffusers":
        state = {names + key: value for key, value in to_ldm(state, CONFIG).items()}
    file = tmp_path / f"weights{suffix}"
    plain = {key: value.contiguous() for key, value in state.items()}
    save_file(plain, file) if suffix == ".safetensors" else torch.save(
        {"state_dict": plain, "epoch": 3}, file
    )
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
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "vae.safetensors"
    )
    loaded = AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")
    assert loaded.config == config
    assert "norms taken to have 32 groups" in capsys.readouterr().err


@pytest.mark.parametrize("convolutional", [False, True])
def test_names_of_2023_are_read_with_a_config_and_without(convolutional, model, tmp_path):
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = {}
    for key, value in model.state_dict().items():
        for new, before in old.items():
            if new in key and convolutional and key.endswith("weight"):
                value = value[:, :, None, None]
            key = key.replace(new, before)
        state[key] = value.contiguous()
    if convolutional:
        write_json(tmp_path / "config.json", CONFIG.diffusers_dict())
    save_file(state, tmp_path / "vae.safetensors")
    assert same(tmp_path / "vae.safetensors", model)


def test_a_shape_that_the_tensors_do_not_tell_asks_for_the_config(tmp_path):
    model = AutoencoderKL(preset("tiny"))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "vae.safetensors"
    )
    with pytest.raises(
        ModelError, match=r"put its config\.json next to it: .* multiple of norm_num_groups 32"
    ):
        AutoencoderKL.from_pretrained(tmp_path / "vae.safetensors")


class Hostile:
    """Pickles as a call of os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def archive_without_pickle(made: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/readme.txt", "nothing here")
    return buffer.getvalue()


def claimed_terabytes(made: Path) -> bytes:
    one, side = torch.zeros(1), 2**20
    names = (
        "encoder.mid.block_1.conv1",
        "encoder.down.0.block.0.conv1",
        "encoder.conv_in",
        "encoder.conv_out",
        "decoder.conv_in",
    )
    return saved({f"{name}.weight": one.expand(side, side, 3, 3) for name in names})


BAD: dict[str, Callable[[Path], bytes]] = {
    "archive that runs code": lambda made: saved({"state_dict": {"encoder.conv_in.weight": Hostile(made)}}),
    "pickle that runs code": lambda made: pickle.dumps(
        {"state_dict": {"encoder.conv_in.weight": Hostile(made)}}
    ),
    "truncated": lambda made: saved(to_ldm(AutoencoderKL(CONFIG).state_dict(), CONFIG))[:-1000],
    "damaged": lambda made: bytes(64) + saved({"state_dict": torch.zeros(3)})[64:],
    "empty": lambda made: b"",
    "archive without a pickle": archive_without_pickle,
    "a list": lambda made: saved([torch.zeros(3)]),
    "another architecture": lambda made: saved(
        {"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7), 5: torch.zeros(1)}}
    ),
    "claims terabytes": claimed_terabytes,
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_pickle_is_refused_in_one_line_and_runs_nothing(what, tmp_path):
    file, made = tmp_path / ("model.bin" if what == "truncated" else "model.ckpt"), tmp_path / "made"
    file.write_bytes(BAD[what](made))
    for use in (AutoencoderKL.from_pretrained, load_initial, lambda path: export(path, tmp_path / "vae")):
        with pytest.raises(ModelError, match=r"model\.(ckpt|bin)") as caught:
            use(file)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert not made.exists()
    assert not (tmp_path / "vae").exists()
    if "runs code" in what:  # the file is harmful, for those who load it so
        torch.load(file, weights_only=False) if what.startswith("archive") else pickle.loads(
            file.read_bytes()
        )
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
    file, config = tmp_path / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae/config.json"
    state = load_file(file)
    for changed, message in (
        (
            {key: value for key, value in state.items() if key != "encoder.conv_in.bias"},
            r"lacks encoder\.conv_in\.bias",
        ),
        ({**state, "encoder.extra": torch.zeros(1)}, r"unknown encoder\.extra"),
    ):
        save_file(changed, file)
        with pytest.raises(ModelError, match=message):
            AutoencoderKL.from_pretrained(tmp_path / "vae")
    config.write_text(config.read_text().replace('"AutoencoderKL"', '"AsymmetricAutoencoderKL"'))
    with pytest.raises(ModelError, match="describes a AsymmetricAutoencoderKL"):
        AutoencoderKL.from_pretrained(tmp_path / "vae")


def test_what_is_no_file_of_an_autoencoder_is_refused_with_the_reason(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    save_file({"fc.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    for name, message in (
        ("photo.png", r"photo\.png is no file of weights; expected \.safetensors"),
        ("weights.safetensors", r"no config\.json is next to it"),
        ("nowhere.ckpt", "does not exist"),
    ):
        with pytest.raises(ModelError, match=message):
            AutoencoderKL.from_pretrained(tmp_path / name)
