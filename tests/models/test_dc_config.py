"""Configs of AutoencoderDC: diffusers' keys and defaults, the published ones, and refusals."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from small_models import DC

from latentae.errors import ModelError
from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig, build, read_config
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.presets import DC_PRESETS, preset, preset_kind, preset_names

diffusers = pytest.importorskip("diffusers")


def _in(latent: int, widths: list[int]) -> dict:
    """config.json of mit-han-lab's dc-ae-...-in-1.0."""
    levels, deep = len(widths), len(widths) - 3
    kinds = ["ResBlock"] * 3 + ["EfficientViTBlock"] * deep
    return {
        "in_channels": 3,
        "latent_channels": latent,
        "attention_head_dim": 32,
        "encoder_block_types": kinds,
        "decoder_block_types": kinds,
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
        "encoder_layers_per_block": [0, 4, 8] + [2] * deep,
        "decoder_layers_per_block": [0, 5, 10] + [2] * deep,
        "encoder_qkv_multiscales": [[]] * levels,
        "decoder_qkv_multiscales": [[]] * levels,
        "upsample_block_type": "pixel_shuffle",
        "downsample_block_type": "pixel_unshuffle",
        "decoder_norm_types": ["batch_norm"] * 3 + ["rms_norm"] * deep,
        "decoder_act_fns": ["relu"] * 3 + ["silu"] * deep,
        "scaling_factor": 0.3189,
    }


SANA = {
    **_in(32, [128, 256, 512, 512, 1024, 1024]),
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3] * 6,
    "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "decoder_norm_types": "rms_norm",
    "decoder_act_fns": "silu",
    "scaling_factor": 0.41407,
}
PUBLISHED = {
    "f32c32-sana": SANA,
    "f32c32-in": _in(32, [128, 256, 512, 512, 1024, 1024]),
    "f64c128-in": _in(128, [128, 256, 512, 512, 1024, 1024, 2048]),
    "f128c512-in": _in(512, [128, 256, 512, 512, 1024, 1024, 2048, 2048]),
}


def shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def test_keys_and_defaults_are_those_of_diffusers():
    theirs = {name: p.default for name, p in inspect.signature(diffusers.AutoencoderDC).parameters.items()}
    values = AutoencoderDCConfig().model_dump()
    assert {
        name: value for name, value in values.items() if name not in ("bottleneck", "sample_size")
    } == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_diffusers_keys_and_shapes_and_is_written_as_it_was(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **PUBLISHED[name]}))
    config = read_config(tmp_path / "config.json")
    assert config.downsampling == int(name[1:].split("c")[0])
    with torch.device("meta"):
        ours, theirs = build(config), diffusers.AutoencoderDC(**PUBLISHED[name])
    assert isinstance(ours, AutoencoderDC)
    assert shapes(ours) == shapes(theirs)
    written = {key: value for key, value in config.diffusers_dict().items() if not key.startswith("_")}
    assert written.keys() == inspect.signature(diffusers.AutoencoderDC).parameters.keys()
    assert {**written, **PUBLISHED[name]} == written


@pytest.mark.parametrize("name", DC_PRESETS)
def test_presets_have_diffusers_keys_and_shapes(name):
    config = preset(name, sample_size=256)
    assert preset_kind(name) is AutoencoderDCConfig
    assert name in preset_names()
    shapes_of = {
        "dc-f8": (8, 16),
        "dc-f16": (16, 32),
        "dc-f32-z32": (32, 32),
        "dc-f64-z128": (64, 128),
        "dc-tiny": (8, 16),
    }
    assert (config.downsampling, config.latent_channels, config.sample_size) == (*shapes_of[name], 256)
    values = {key: value for key, value in config.diffusers_dict().items() if not key.startswith("_")}
    with torch.device("meta"):
        ours, theirs = build(config), diffusers.AutoencoderDC(**values)
    assert shapes(ours) == shapes(theirs)
    if name == "dc-tiny":
        assert sum(p.numel() for p in ours.parameters()) < 2_000_000


@pytest.mark.parametrize(("shape", "published"), [("dc-f32-z32", "f32c32-in"), ("dc-f64-z128", "f64c128-in")])
def test_presets_differ_from_the_published_models_in_norms_and_activations_only(shape, published):
    config = preset(shape).diffusers_dict()
    differing = {key for key, value in PUBLISHED[published].items() if config[key] != value}
    assert differing == {"decoder_norm_types", "decoder_act_fns", "scaling_factor"}


def test_widths_and_layers_of_a_preset_can_be_replaced_for_both_sides():
    config = preset(
        "dc-tiny", block_out_channels=(8, 16, 16, 32), layers_per_block=2, latent_channels=8, in_channels=1
    )
    assert isinstance(config, AutoencoderDCConfig)
    assert config.encoder_block_out_channels == config.decoder_block_out_channels == (8, 16, 16, 32)
    assert config.encoder_layers_per_block == (2, 2, 2, 0)  # an empty level stays empty
    assert preset("dc-tiny", layers_per_block=(1, 1, 1, 1)).model_dump()["decoder_layers_per_block"] == (
        1,
        1,
        1,
        1,
    )
    assert config.in_channels == config.out_channels == 1
    assert config.shift_factor == 0
    assert (
        preset("dc-tiny", block_out_channels=[8, 16, 16, 32], layers_per_block=[1, 1, 1, 1]).downsampling == 8
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_block_out_channels": (8, 16)}, "3 levels but decoder_block_out_channels 2"),
        ({"encoder_layers_per_block": (1, 1)}, "encoder_layers_per_block has 2 levels"),
        ({"decoder_qkv_multiscales": ((),)}, "decoder_qkv_multiscales has 1 levels"),
        ({"encoder_layers_per_block": (1, 0, 1)}, "0 at level 1; only the finest and the coarsest"),
        ({"decoder_layers_per_block": (1, -1, 1)}, "-1 at level 1"),
        ({"encoder_block_types": ("ResBlock",)}, "encoder_block_types has 1 levels, the model 3"),
        ({"decoder_block_types": "Mamba"}, "'Mamba'; this family knows ResBlock, EfficientViTBlock"),
        ({"decoder_norm_types": "layer_norm"}, "'layer_norm'; this family knows rms_norm, batch_norm"),
        ({"decoder_act_fns": "relu6"}, "decoder_act_fns has 'relu6'"),
        ({"decoder_conv_act_fn": "tanh"}, "decoder_conv_act_fn has 'tanh'"),
        ({"upsample_block_type": "bilinear"}, "upsample_block_type has 'bilinear'"),
        ({"downsample_block_type": "pool"}, "downsample_block_type has 'pool'"),
        ({"encoder_block_out_channels": (8, 24, 32)}, "from 8 to 24, which does not divide 4 x 8"),
        (
            {"encoder_block_out_channels": (8, 16, 2), "latent_channels": 2, "attention_head_dim": 2},
            "multiples of 4",
        ),
        ({"latent_channels": 5}, "which latent_channels 5 does not divide"),
        ({"encoder_qkv_multiscales": ((), (), (4,))}, "windows are odd"),
        ({"attention_head_dim": 64}, "a head needs as many"),
        ({"groups": 4}, "groups = 4, which AutoencoderDC does not know"),
        ({"scaling_factor": 0}, "scaling_factor"),
    ],
)  # fmt: skip
def test_configs_that_make_no_model_are_refused(changes, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderDC", **DC, **changes}))
    with pytest.raises(ModelError, match=message):
        read_config(tmp_path / "config.json")


def test_other_options_are_refused_for_a_preset():
    with pytest.raises(ModelError, match="model preset dc-f8: unknown option norm_num_groups"):
        preset("dc-f8", norm_num_groups=4)
    with pytest.raises(ModelError, match="out_channels"):
        preset("dc-f8", in_channels=3, out_channels=4)
    with pytest.raises(ModelError, match="unknown model preset 'dc-f9'"):
        preset_kind("dc-f9")
    assert preset_kind("kl-f8") is AutoencoderKLConfig


def test_only_a_posterior_is_written_in_addition_to_diffusers_keys():
    plain = AutoencoderDCConfig(**DC, sample_size=64).diffusers_dict()
    gaussian = AutoencoderDCConfig(**DC, bottleneck="gaussian").diffusers_dict()
    assert gaussian == {**plain, "bottleneck": "gaussian"}
    assert "sample_size" not in plain
