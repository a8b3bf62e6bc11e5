"""Unknown tensors in files are refused by name; those of a training or component are logged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import equal

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.initialization import load_initial
from latentae.models.ldm import to_ldm
from latentae.models.pretrained import load_model

LEVELS: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CONFIG = AutoencoderKLConfig(block_out_channels=(32, 32), **LEVELS)


@pytest.fixture(scope="module")
def model() -> AutoencoderKL:
    return AutoencoderKL(CONFIG)


def write(file, state):
    save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in state.items()}, file)
    return file


def state_of(model, names):
    return dict(model.state_dict()) if names == "diffusers" else to_ldm(model.state_dict(), CONFIG)


def refused(path, *words):
    """Every loader that takes a MODEL, and both that take weights to begin with."""
    for load in (AutoencoderKL.from_pretrained, load_model, load_initial):
        with pytest.raises(ModelError) as caught:
            load(path)
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in (str(path.name), *words)), message


def test_the_official_layout_of_flux2_is_refused_by_name(model, tmp_path):
    state = {}
    for key, value in to_ldm(model.state_dict(), CONFIG).items():
        side = {"quant_conv": "encoder.", "post_quant_conv": "decoder."}.get(key.split(".")[0], "")
        state[side + key] = value
    statistics = {
        "bn.running_mean": torch.zeros(12),
        "bn.running_var": torch.ones(12),
        "bn.num_batches_tracked": torch.tensor(3),
    }
    refused(
        write(tmp_path / "flux2.safetensors", {**state, **statistics}),
        "bn.running_mean",
        "FLUX.2",
        "diffusers folder",
    )
    refused(write(tmp_path / "quant.safetensors", state), "encoder.quant_conv.weight", "FLUX.2")


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_layers_over_time_are_refused_by_name(prefix, model, tmp_path):
    state = {prefix + key: value for key, value in to_ldm(model.state_dict(), CONFIG).items()}
    state[f"{prefix}decoder.up.0.block.0.mix_factor"] = torch.zeros(1)
    state[f"{prefix}decoder.up.0.block.0.time_stack.in_layers.2.weight"] = torch.zeros(3)
    refused(write(tmp_path / "svd.safetensors", state), "mix_factor", "time_stack", "videos")


@pytest.mark.parametrize("names", ["ldm", "diffusers"])
@pytest.mark.parametrize(
    ("prefix", "unknown"),
    [
        ("", "encoder.extra.weight"),
        ("first_stage_model.", "decoder.conv_in.lora_A.weight"),
        ("module.", "scale_shift_table"),
        ("model.vae.", "quant_conv.weight_scale"),
    ],
)
def test_any_unknown_tensor_is_refused_by_name(names, prefix, unknown, model, tmp_path):
    state = {prefix + key: value for key, value in state_of(model, names).items()}
    refused(write(tmp_path / "weights.safetensors", {**state, prefix + unknown: torch.zeros(3)}), unknown)


def test_unknown_tensors_of_folders_and_checkpoints_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "vae")
    write(
        tmp_path / "vae/diffusion_pytorch_model.safetensors",
        {**model.state_dict(), "bn.running_mean": torch.zeros(12)},
    )
    with pytest.raises(ModelError, match=r"unknown bn\.running_mean"):
        AutoencoderKL.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    write(
        tmp_path / "vae/vae.ldm.safetensors",
        {**to_ldm(model.state_dict(), CONFIG), "bn.running_mean": torch.zeros(12)},
    )
    with pytest.raises(ModelError, match=r"bn\.running_mean"):
        AutoencoderKL.from_pretrained(tmp_path / "vae")
    (tmp_path / "vae/vae.ldm.safetensors").rename(tmp_path / "vae/ema.safetensors")
    (tmp_path / "vae/meta.json").write_text("{}")
    with pytest.raises(ModelError, match=r"bn\.running_mean"):
        load_model(tmp_path / "vae")


@pytest.mark.parametrize("prefix", ["first_stage_model.", "model."])
def test_a_layer_of_the_autoencoder_outside_of_its_prefix_is_refused(prefix, model, tmp_path):
    state = {prefix + key: value for key, value in to_ldm(model.state_dict(), CONFIG).items()}
    refused(
        write(tmp_path / "weights.safetensors", {**state, "bn.running_mean": torch.zeros(12)}),
        "bn.running_mean",
    )


def test_several_autoencoders_in_one_file_are_refused(model, tmp_path):
    state = {
        f"{prefix}.{key}": value
        for prefix in ("net", "teacher")
        for key, value in to_ldm(model.state_dict(), CONFIG).items()
    }
    refused(write(tmp_path / "weights.safetensors", state), "several autoencoders", "net., teacher.")


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ("ldm", ""),
        ("ldm", "first_stage_model."),
        ("diffusers", "vae."),
        ("ldm", "module."),
        ("diffusers", "model.vae."),
    ],
)
def test_what_a_training_or_another_component_left_is_logged(names, prefix, model, tmp_path, capsys):
    state = {prefix + key: value for key, value in state_of(model, names).items()}
    state |= {
        f"{prefix}loss.logvar": torch.zeros(()),
        f"{prefix}loss.discriminator.main.0.bias": torch.zeros(4),
    }
    state[f"{prefix}model_ema.decay"] = torch.zeros(())
    if prefix not in ("", "module."):
        state |= {"cond_stage_model.weight": torch.zeros(3), "betas": torch.zeros(3)}
    file = write(tmp_path / "weights.safetensors", state)
    for _ in range(2):
        assert equal(AutoencoderKL.from_pretrained(file).state_dict(), model)
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == 1  # once in a process
    assert str(file) in lines[0]
    assert "loss.*" in lines[0]
    assert ("betas" in lines[0]) == (prefix not in ("", "module."))


def test_the_average_that_is_taken_or_left_out_is_logged(model, tmp_path, capsys):
    state, average = to_ldm(model.state_dict(), CONFIG), AutoencoderKL(CONFIG)
    averaged = {
        "model_ema." + key.replace(".", ""): value
        for key, value in to_ldm(average.state_dict(), CONFIG).items()
    }
    file = write(tmp_path / "whole.safetensors", {**state, **averaged})
    assert equal(AutoencoderKL.from_pretrained(file).state_dict(), average)
    assert "took the averaged weights" in capsys.readouterr().err
    averaged.pop("model_ema.encoderconv_inbias")
    file = write(tmp_path / "part.safetensors", {**state, **averaged})
    assert equal(AutoencoderKL.from_pretrained(file).state_dict(), model)
    assert f"left out model_ema.* ({len(averaged)})" in capsys.readouterr().err


@pytest.mark.parametrize("names", ["ldm", "diffusers"])
def test_quantized_weights_are_refused(names, model, tmp_path):
    state = {
        key: value.to(torch.int8) if "conv_in.weight" in key else value
        for key, value in state_of(model, names).items()
    }
    refused(write(tmp_path / "weights.safetensors", state), "torch.int8", "not quantized")


def test_attention_by_wider_convolutions_is_not_cut_to_their_corner(model, tmp_path):
    key = "encoder.mid_block.attentions.0.to_q.weight"
    state = {**model.state_dict(), key: torch.zeros(32, 32, 3, 3)}
    refused(write(tmp_path / "weights.safetensors", state), key, "(32, 32, 3, 3)")


def test_a_discriminator_of_another_kind_is_not_cut_to_what_fits(model, tmp_path, capsys):
    layers = {
        "loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
        "loss.discriminator.head.weight": torch.zeros(3),
    }
    running = {"loss.discriminator.main.3.running_mean": torch.zeros(8)}
    file = write(
        tmp_path / "weights.safetensors", {**to_ldm(model.state_dict(), CONFIG), **layers, **running}
    )
    found = load_initial(file).discriminator
    assert found is not None
    assert set(found) == {"layers.0.weight", "head.weight"}
    assert "running statistics of the discriminator's BatchNorm (1 tensors)" in capsys.readouterr().err
