"""LDM's names of our weights, against diffusers' own converter."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import save_file
from small_models import equal, randomize_norms

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.discriminator import PatchDiscriminator
from latentae.models.ldm import discriminator_from_ldm, infer_config, ldm_prefix, to_ldm
from latentae.models.presets import PRESETS, preset
from latentae.models.state_dicts import fitting_state

FAMILY = [
    name for name in PRESETS if name.startswith("kl-")
]  # the tiny ones have other groups, which tensors do not tell


def narrow(name: str, **overrides) -> AutoencoderKLConfig:
    """A preset a quarter as wide: LDM has 32 groups, so 32 is its narrowest."""
    return preset(
        name, block_out_channels=tuple(w // 4 for w in PRESETS[name]["block_out_channels"]), **overrides
    )


def model(config: AutoencoderKLConfig) -> AutoencoderKL:
    return randomize_norms(AutoencoderKL(config))


def from_ldm(tensors: dict[str, torch.Tensor], config: AutoencoderKLConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return fitting_state(AutoencoderKL(config), tensors, "vae.ckpt")


@pytest.mark.parametrize(
    ("name", "prefix", "absent"),
    [
        *((name, ("", "first_stage_model.", "vae.")[index % 3], None) for index, name in enumerate(FAMILY)),
        *(
            ("kl-f4", "", layer)
            for layer in ("use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")
        ),
    ],
)
def test_there_and_back(name, prefix, absent):
    autoencoder = model(narrow(name) if absent is None else narrow(name, **{absent: False}))
    state = autoencoder.state_dict()
    tensors = {prefix + key: value for key, value in to_ldm(state, autoencoder.config).items()}
    assert ldm_prefix(tensors) == prefix
    config = infer_config({**tensors, "model.diffusion_model.out.2.weight": torch.zeros(4, 4, 3, 3)})
    assert config == autoencoder.config
    assert equal(from_ldm(tensors, config), state)
    with torch.device("meta"):  # at the published width
        published = AutoencoderKL(preset(name))
        assert infer_config(to_ldm(published.state_dict(), published.config)) == published.config


def test_the_names_are_those_of_the_published_files():
    with torch.device("meta"):
        state = AutoencoderKL(preset("kl-f16")).state_dict()
    names = to_ldm(state, preset("kl-f16")).keys()
    assert len(names) == len(state)
    for name in (
        "encoder.conv_in.weight", "encoder.down.0.block.0.norm1.weight",
        "encoder.down.2.block.0.nin_shortcut.weight", "encoder.down.4.attn.1.q.weight",
        "encoder.down.4.attn.1.norm.bias", "encoder.down.3.downsample.conv.bias",
        "encoder.mid.block_1.conv1.weight", "encoder.mid.attn_1.proj_out.bias",
        "encoder.mid.block_2.conv2.bias", "encoder.norm_out.weight", "decoder.up.4.attn.2.k.weight",
        "decoder.up.4.upsample.conv.weight", "decoder.up.0.block.2.conv2.weight",
        "decoder.norm_out.bias", "decoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.bias",
    ):  # fmt: skip
        assert name in names, name
    assert not any(name.startswith(("decoder.up.0.upsample", "encoder.down.4.downsample")) for name in names)
    assert to_ldm({"encoder.mid_block.attentions.0.to_q.weight": torch.zeros(8, 8)}, narrow("kl-f8"))[
        "encoder.mid.attn_1.q.weight"
    ].shape == (8, 8, 1, 1)


@pytest.mark.parametrize(("name", "prefix"), [("kl-f4", ""), ("kl-f8", "first_stage_model.")])
def test_diffusers_reads_our_file_as_we_do(name, prefix, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    autoencoder = model(narrow(name)).eval()
    tensors = to_ldm(autoencoder.state_dict(), autoencoder.config)
    save_file(
        {prefix + key: value.contiguous() for key, value in tensors.items()}, tmp_path / "ldm.safetensors"
    )
    diffusers.AutoencoderKL(**autoencoder.config.model_dump()).save_config(tmp_path / "config")
    theirs = diffusers.AutoencoderKL.from_single_file(
        str(tmp_path / "ldm.safetensors"), config=str(tmp_path / "config"), local_files_only=True
    )
    ours = AutoencoderKL.from_pretrained(tmp_path / "ldm.safetensors")
    assert equal(ours.state_dict(), theirs.state_dict())
    x = torch.rand(1, 3, 32, 32, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        latent = ours.double().encode(x).mode()
        torch.testing.assert_close(theirs.double().encode(x).latent_dist.mode(), latent, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs.decode(latent).sample, ours.decode(latent), rtol=1e-6, atol=1e-6)


def test_a_whole_average_is_taken_and_a_part_of_one_is_not():
    autoencoder, average = model(narrow("kl-f4")), model(narrow("kl-f4"))
    config = autoencoder.config
    tensors = to_ldm(autoencoder.state_dict(), config)
    averaged = {
        "model_ema." + key.replace(".", ""): value
        for key, value in to_ldm(average.state_dict(), config).items()
    }
    rest = {"model_ema.decay": torch.tensor(0.999), "loss.logvar": torch.zeros(())}
    assert equal(from_ldm({**tensors, **averaged, **rest}, config), average.state_dict())
    averaged.pop("model_ema.encoderconv_inbias")
    assert equal(from_ldm({**tensors, **averaged, **rest}, config), autoencoder.state_dict())


def test_the_scaling_of_a_latent_diffusion_model_is_kept():
    config = narrow("kl-f8")
    tensors = {
        "first_stage_model." + key: value for key, value in to_ldm(model(config).state_dict(), config).items()
    }
    assert infer_config({**tensors, "scale_factor": torch.tensor(0.5)}).scaling_factor == 0.5
    assert infer_config(tensors).scaling_factor == 0.18215
    with pytest.raises(ModelError, match=r"scaling_factor is 0\.0, expected above 0"):
        infer_config({**tensors, "scale_factor": torch.tensor(0.0)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.mid.block_1.conv1.weight": None}, "no LDM autoencoder"),
        ({"encoder.conv_out.weight": torch.zeros(3, 128, 3, 3)}, "such as VQ"),
        ({"encoder.down.0.block.0.conv1.weight": None}, "has no encoder.down.0.block.0.conv1.weight"),
        ({"decoder.conv_out.weight": None}, "decoder.conv_out.weight is missing"),
        ({"encoder.conv_in.weight": torch.zeros(32, 3, 3, 3, 3)}, r"has shape \(32, 3, 3, 3, 3\)"),
        ({"decoder.up.0.block.1.conv2.bias": None}, "lacks decoder.up.0.block.1.conv2.bias"),
        ({"quant_conv.weight": torch.zeros(4, 8, 1, 1)}, r"quant_conv.weight has shape \(4, 8, 1, 1\)"),
        (
            {"encoder.mid.attn_1.k.weight": torch.zeros(128, 128, 3, 3)},
            r"attn_1.k.weight has shape \(128, 128, 3, 3\)",
        ),
        (
            {"encoder.down.0.block.0.conv1.weight": torch.zeros(20, 32, 3, 3)},
            "multiple of norm_num_groups 32",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    config = narrow("kl-f8")
    tensors = {**to_ldm(model(config).state_dict(), config), **change}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    with pytest.raises(ModelError, match=message) as caught:
        from_ldm(tensors, infer_config(tensors))
    assert "\n" not in str(caught.value)


def ldm_discriminator(channels: int = 16, layers: int = 2) -> dict[str, torch.Tensor]:
    """State dict of LDM's NLayerDiscriminator: convolutions without bias before BatchNorm."""
    nn, act = torch.nn, torch.nn.LeakyReLU(0.2)
    widths = [channels * 2**index for index in range(layers + 1)]
    modules = [nn.Conv2d(3, channels, 4, 2, 1), act]
    for before, width in itertools.pairwise(widths):
        modules += [
            nn.Conv2d(before, width, 4, 2 if width < widths[-1] else 1, 1, bias=False),
            nn.BatchNorm2d(width),
            act,
        ]
    main = nn.Sequential(*modules, nn.Conv2d(widths[-1], 1, 4, 1, 1))
    return {f"loss.discriminator.main.{key}": value for key, value in main.state_dict().items()}


@pytest.mark.parametrize("norm", ["group", "instance"])
def test_a_patch_discriminator_keeps_all_but_running_statistics(norm):
    theirs = ldm_discriminator()
    state = discriminator_from_ldm(theirs)
    assert state is not None
    assert {key.replace("layers.", "loss.discriminator.main.") for key in state} == {
        key for key in theirs if "running" not in key and "num_batches" not in key
    }
    ours = PatchDiscriminator(3, 16, 2, norm)
    ours.load_state_dict(state)
    assert torch.equal(ours.state_dict()["layers.0.weight"], theirs["loss.discriminator.main.0.weight"])
    assert discriminator_from_ldm({"encoder.mid.block_1.conv1.weight": torch.zeros(1)}) is None
