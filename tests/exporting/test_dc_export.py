"""An AutoencoderDC as others load it: a plain diffusers folder, its fp16 variant, ONNX files; and
what is refused.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from latentae import (
    AutoencoderDC,
    AutoencoderDCConfig,
    AutoencoderKLConfig,
    LinearAutoencoder,
    LinearAutoencoderConfig,
    encode,
    export,
)
from latentae.encoding.latent_dataset import LatentDataset
from latentae.errors import ModelError, RecipeError
from latentae.exporting.export import written_formats
from latentae.exporting.programs import coder_graphs
from latentae.files import read_json

VALUES = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 8, 16),
    "decoder_block_out_channels": (8, 8, 16),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,)),
    "decoder_qkv_multiscales": ((), (), (5,)),
}
SHAPES = {
    "plain": {},
    "sana": {"downsample_block_type": "Conv", "upsample_block_type": "interpolate"},
    "in": {
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (0, 1, 1),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
        "encoder_qkv_multiscales": ((),) * 3,
        "decoder_qkv_multiscales": ((),) * 3,
    },
    "gaussian": {"bottleneck": "gaussian"},
}


def build(shape: str = "plain") -> AutoencoderDC:
    torch.manual_seed(0)
    model = AutoencoderDC(AutoencoderDCConfig(**{**VALUES, **SHAPES[shape]})).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.2)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """A model folder of each shape."""
    root = tmp_path_factory.mktemp("models")
    for shape in SHAPES:
        build(shape).save_pretrained(root / shape)
    return {shape: root / shape for shape in SHAPES}


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_loads_it_without_a_word(shape, saved, load_quietly, diffusers, tmp_path):
    ours = build(shape)
    export(saved[shape], tmp_path / "vae", scaling_factor=0.25)
    theirs = load_quietly(diffusers.AutoencoderDC, tmp_path / "vae")
    config = read_json(tmp_path / "vae/config.json")
    assert set(config) == {"_class_name", "_diffusers_version"} | {
        key for key in theirs.config if not key.startswith("_")
    }
    assert config["scaling_factor"] == 0.25
    assert not {"bottleneck", "sample_size"} & set(config)

    x = torch.rand(2, 3, 32, 24) * 2 - 1
    with torch.no_grad():
        expected, latent = ours(x, sample_posterior=False), theirs.encode(x).latent
        torch.testing.assert_close(latent, expected.posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.decode(latent).sample, expected.reconstruction, rtol=0, atol=1e-5)
    back = AutoencoderDC.from_pretrained(tmp_path / "vae")
    assert back.config.bottleneck == "deterministic"
    assert torch.equal(back.encode(x).mean, ours.encode(x).mean)


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_variant_loads_in_diffusers(variant, dtype, saved, diffusers, tmp_path):
    export(saved["in"], tmp_path / "vae", variant=variant)
    theirs = diffusers.AutoencoderDC.from_pretrained(tmp_path / "vae", variant=variant, torch_dtype=dtype)
    stored = load_file(tmp_path / f"vae/diffusion_pytorch_model.{variant}.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {dtype}
    assert theirs.dtype == dtype
    for key, value in build("in").state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value.to(theirs.state_dict()[key].dtype))


def test_figures_are_measured_and_the_scale_is_that_of_diffusers(saved, photo_shards, tmp_path):
    """1 / root mean square of the latents; nothing is shifted."""
    export(
        saved["gaussian"],
        tmp_path / "vae",
        data=photo_shards,
        resolution=32,
        images=6,
        perceptual="none",
        device="cpu",
    )
    config, statistics = (
        read_json(tmp_path / "vae" / name) for name in ("config.json", "latent_statistics.json")
    )
    assert "shift_factor" not in config
    assert statistics["shift_factor"] == 0
    assert statistics["scaling_factor"] == config["scaling_factor"]

    rms = math.sqrt(
        sum(m**2 + s**2 for m, s in zip(statistics["latents_mean"], statistics["latents_std"], strict=True))
        / 4
    )
    assert config["scaling_factor"] == pytest.approx(1 / rms, rel=1e-6)
    encode(
        tmp_path / "vae",
        photo_shards,
        tmp_path / "latents",
        dtype="fp32",
        resolution=32,
        device="cpu",
        workers=0,
    )
    dataset = LatentDataset(tmp_path / "latents")
    means, logvars = zip(*(dataset.posterior(index)[1:] for index in range(len(dataset))), strict=True)
    assert (torch.stack(means) * config["scaling_factor"]).square().mean().item() == pytest.approx(
        1.0, rel=1e-4
    )
    assert (torch.stack(logvars) == -30).all()
    card = (tmp_path / "vae/README.md").read_text()
    for text in (
        "A deep-compression autoencoder (`AutoencoderDC`)",
        "| `scaling_factor` |",
        "PSNR",
        "fp16 against fp32",
        "no tiling",
    ):
        assert text in card
    assert "shift_factor" not in card
    assert "force_upcast" not in card


def shapes_of(names: dict) -> tuple:
    return names["latents"].shape, names["decoded"].shape


def test_the_cards_snippets_run(saved, run_snippets, tmp_path):
    export(saved["plain"], tmp_path / "vae")
    found = run_snippets(tmp_path / "vae", torch.rand(1, 3, 16, 20) * 2 - 1)
    assert [shapes_of(names) for names in found] == [((1, 4, 4, 5), (1, 3, 16, 20))] * 2


@pytest.fixture(
    scope="module",
    params=["plain", *(pytest.param(shape, marks=pytest.mark.slow) for shape in ("in", "sana"))],
)
def written(request, saved, tmp_path_factory) -> tuple[AutoencoderDC, Path]:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp(request.param) / "vae"
    export(saved[request.param], folder, format="onnx")
    return build(request.param), folder


def test_onnxruntime_equals_the_model_at_unseen_sizes(written, onnx_run, run_snippets):
    model, folder = written
    f, z = model.config.downsampling, model.config.latent_channels
    for batch, height, width in [(1, 5, 2), (3, 2, 7), (17, 3, 2), (2, 1, 1), (1, 9, 16)]:
        images, latents = torch.randn(batch, 3, f * height, f * width), torch.randn(batch, z, height, width)
        with torch.no_grad():
            mean, decoded = model.encode(images).mean, model.decode(latents)
        torch.testing.assert_close(
            onnx_run(folder / "vae_encoder/model.onnx", images), mean, rtol=0, atol=1e-4
        )
        torch.testing.assert_close(
            onnx_run(folder / "vae_decoder/model.onnx", latents), decoded, rtol=0, atol=1e-4
        )
    found = run_snippets(folder, torch.rand(1, 3, 16, 20) * 2 - 1)
    assert [shapes_of(names) for names in found] == [((1, 4, 4, 5), (1, 3, 16, 20))]


def test_onnx_files_name_the_latent_and_hold_standard_operators(written):
    onnx = pytest.importorskip("onnx")
    _, folder = written
    for coder, (given, made) in {
        "encoder": ("sample", "latent"),
        "decoder": ("latent_sample", "sample"),
    }.items():
        proto = onnx.load(folder / f"vae_{coder}/model.onnx")
        onnx.checker.check_model(proto, full_check=True)
        assert [value.name for value in (*proto.graph.input, *proto.graph.output)] == [given, made]
        assert {node.domain for node in proto.graph.node} == {""}


def test_graphs_of_a_posterior_give_its_mean():
    model = build("gaussian")
    graphs = coder_graphs(model)
    x = torch.rand(2, 3, 12, 20)
    with torch.no_grad():
        assert torch.equal(graphs["encoder"](x), model.encode(x).mean)


def test_what_the_kind_does_not_have_is_refused(saved, tmp_path):
    for options, message in (
        ({"format": "ldm"}, "format ldm has no key names for an AutoencoderDC"),
        (
            {"fold_normalization": True, "statistics": tmp_path},
            "fold_normalization is not possible for an AutoencoderDC",
        ),
        ({"shift_factor": 0.1}, "diffusers' AutoencoderDC has none"),
    ):
        with pytest.raises(RecipeError, match=message):
            export(saved["plain"], tmp_path / "vae", **options)
    assert not (tmp_path / "vae").exists()
    LinearAutoencoder(LinearAutoencoderConfig()).save_pretrained(tmp_path / "linear")
    with pytest.raises(ModelError, match="only AutoencoderKL and AutoencoderDC can be exported"):
        export(tmp_path / "linear", tmp_path / "vae")


def test_all_formats_are_those_of_the_kind():
    assert written_formats("all", AutoencoderKLConfig()) == ("diffusers", "ldm", "onnx", "pt2")
    assert written_formats("all", build().config) == ("diffusers", "onnx", "pt2")
    assert written_formats("onnx", build().config) == ("onnx",)
