from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentae import AutoencoderKL, AutoencoderKLConfig, export
from latentae.errors import ModelError, OutputError, RecipeError
from latentae.files import read_json, write_json
from latentae.models.presets import preset
from latentae.models.pretrained import resolve_model

FILES = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "latentae.json"}
SHAPES = {
    "plain": {
        "norm_num_groups": 4,
        "block_out_channels": (8, 16),
        "mid_block_add_attention": False,
        "use_quant_conv": False,
    },
    "kl-f8": {"norm_num_groups": 4, "block_out_channels": (8, 8, 16, 16)},
    "kl-f16": {"norm_num_groups": 4, "block_out_channels": (8, 8, 8, 8, 16)},
}


def config_of(shape: str) -> AutoencoderKLConfig:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return (
        AutoencoderKLConfig(**blocks, **SHAPES[shape]) if shape == "plain" else preset(shape, **SHAPES[shape])
    )


@pytest.fixture(scope="module")
def model(save_model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", config_of("kl-f8"))


def copied(model: Path, folder: Path, **config: object) -> Path:
    """The same weights with another config."""
    AutoencoderKL.from_pretrained(model).save_pretrained(folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **config})
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_loads_it_without_a_word(shape, save_model, load_quietly, diffusers, tmp_path):
    """It has exactly diffusers' keys and gives the same reconstruction."""
    model = save_model(tmp_path / "model", config_of(shape))
    export(model, tmp_path / "vae")
    theirs = load_quietly(diffusers.AutoencoderKL, tmp_path / "vae")
    assert theirs.dtype == torch.float32
    config = read_json(tmp_path / "vae/config.json")
    assert set(config) == {"_class_name", "_diffusers_version"} | {
        key for key in theirs.config if not key.startswith("_")
    }
    assert (config["_class_name"], config["shift_factor"], config["force_upcast"]) == (
        "AutoencoderKL",
        0.0,
        True,
    )

    ours = AutoencoderKL.from_pretrained(model)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = ours(x, sample_posterior=False)
        posterior = theirs.encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, expected.posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, expected.posterior.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            theirs.decode(posterior.mode()).sample, expected.reconstruction, rtol=0, atol=1e-5
        )


def test_folder_holds_no_more_than_it_says_and_loads_back_bit_for_bit(model, tmp_path):
    summary = export(model, tmp_path / "vae")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == FILES
    assert set(summary["files"]) == FILES - {"latentae.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    one, two = (
        AutoencoderKL.from_pretrained(model),
        AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict(),
    )
    assert one.state_dict().keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.state_dict().items())
    record = read_json(tmp_path / "vae/latentae.json")
    assert record["verb"] == "export"
    assert record["finished"] is True
    assert record["inputs"]["model"] == resolve_model(model).fingerprint
    assert record["parameters"] == sum(p.numel() for p in one.parameters())
    assert str(tmp_path) not in json.dumps(record)


def test_equal_weights_give_equal_bytes(model, tmp_path):
    for name in ("a", "b"):
        export(model, tmp_path / name / "vae", variant="fp16")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name / "vae").iterdir()} for name in ("a", "b")
    )
    assert first == second
    # and as those of the model, which went through channels_last
    assert (
        first["diffusion_pytorch_model.safetensors"]
        == (model / "diffusion_pytorch_model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variant_loads_in_diffusers(variant, dtype, model, diffusers, tmp_path):
    export(model, tmp_path / "vae", variant=variant)
    stored = load_file(tmp_path / f"vae/diffusion_pytorch_model.{variant}.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", variant=variant, torch_dtype=dtype)
    assert theirs.dtype == dtype
    for key, value in AutoencoderKL.from_pretrained(model).state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value.to(dtype))


@pytest.mark.parametrize(("sample_size", "expected"), [(64, 256), (256, 256), (300, 304), (512, 512)])
def test_sample_size_is_the_resolution_but_no_small_tile(sample_size, expected, model, tmp_path):
    export(copied(model, tmp_path / "model", sample_size=sample_size), tmp_path / "vae")
    assert read_json(tmp_path / "vae/config.json")["sample_size"] == expected


def statistics(model: Path, **changes: object) -> dict[str, object]:
    """As encode writes them."""
    values = {
        "model": resolve_model(model).fingerprint,
        "samples": 500,
        "scaling_factor": 0.75,
        "shift_factor": -0.125,
    }
    return {
        **values,
        "latents_mean": [0.5, -0.5, 0.25, -0.75],
        "latents_std": [1.0, 1.5, 0.5, 2.0],
        **changes,
    }


def test_measured_scaling_reaches_config_and_card(model, tmp_path):
    write_json(tmp_path / "latents/statistics.json", statistics(model))
    export(model, tmp_path / "vae", statistics=tmp_path / "latents")
    config, card = read_json(tmp_path / "vae/config.json"), (tmp_path / "vae/README.md").read_text()
    assert (config["scaling_factor"], config["shift_factor"]) == (0.75, -0.125)
    assert config["latents_mean"] is None
    assert "measured over 500 images" in card
    assert "| 3 | -0.75 | 2 |" in card


def test_new_factors_drop_statistics_by_channel_that_came_with_the_config(model, tmp_path):
    """SDXL would scale by both."""
    source = copied(model, tmp_path / "model", latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    export(source, tmp_path / "inherited")
    assert read_json(tmp_path / "inherited/config.json")["latents_std"] == [2.0] * 4
    assert (
        "(z - latents_mean) * scaling_factor / latents_std" in (tmp_path / "inherited/README.md").read_text()
    )
    write_json(tmp_path / "statistics.json", statistics(source))
    export(source, tmp_path / "measured", statistics=tmp_path / "statistics.json")
    assert read_json(tmp_path / "measured/config.json")["latents_std"] is None
    assert "latents_mean" not in (tmp_path / "measured/README.md").read_text()


def test_given_factors_win_and_config_is_the_last_resort(model, tmp_path):
    write_json(tmp_path / "statistics.json", statistics(model))
    export(model, tmp_path / "given", statistics=tmp_path / "statistics.json", scaling_factor=2.0)
    config, card = read_json(tmp_path / "given/config.json"), (tmp_path / "given/README.md").read_text()
    assert (config["scaling_factor"], config["shift_factor"]) == (2.0, -0.125)
    assert "scaling: given at export; shift: measured over 500 images" in card
    export(model, tmp_path / "inherited")
    assert read_json(tmp_path / "inherited/config.json")["scaling_factor"] == 0.18215
    assert "not measured for these weights" in (tmp_path / "inherited/README.md").read_text()


def evaluation(model: Path) -> dict[str, object]:
    """The parts of evaluate's metrics.json that an export reads."""
    return {
        "model": {"fingerprint": resolve_model(model).fingerprint},
        "data": {"images": 64, "resolution": 128},
        "metrics": {
            "psnr": {"mean": 24.6123, "low": 24.1, "high": 25.13, "n": 64, "infinite": 0},
            "perceptual": {"mean": 0.31, "low": None, "high": None, "n": 1, "infinite": 0},
        },
        "perceptual": {"name": "LPIPS (vgg)", "reason": ""},
        "latent": {
            "channel_mean": [0.0] * 4,
            "channel_std": [1.0] * 4,
            "scaling_factor": 0.5,
            "shift_factor": 0.0,
        },
    }


def test_evaluation_gives_metrics_and_scaling(model, tmp_path):
    write_json(tmp_path / "evaluation/metrics.json", evaluation(model))
    export(model, tmp_path / "vae", metrics=tmp_path / "evaluation", statistics=tmp_path / "evaluation")
    card = (tmp_path / "vae/README.md").read_text()
    assert "| PSNR (dB) | 24.61 (95 % interval 24.1 to 25.13) |" in card
    assert "| LPIPS (vgg) | 0.31 |" in card
    assert "| Images | 64, at 128 x 128 pixels |" in card
    assert read_json(tmp_path / "vae/config.json")["scaling_factor"] == 0.5


def test_metrics_may_be_plain_numbers_or_none(model, tmp_path):
    export(model, tmp_path / "some", metrics={"PSNR (dB)": 21.5, "images": 8})
    assert "| PSNR (dB) | 21.5 |\n| images | 8 |" in (tmp_path / "some/README.md").read_text()
    export(model, tmp_path / "none")
    assert "Not measured" in (tmp_path / "none/README.md").read_text()


def test_numbers_of_another_model_are_refused(model, save_model, tmp_path):
    other = save_model(tmp_path / "other", config_of("kl-f8"), seed=1)
    write_json(tmp_path / "statistics.json", statistics(other))
    write_json(tmp_path / "metrics.json", evaluation(other))
    with pytest.raises(ModelError, match="latents of another model"):
        export(model, tmp_path / "vae", statistics=tmp_path / "statistics.json")
    with pytest.raises(ModelError, match="another model"):
        export(model, tmp_path / "vae", metrics=tmp_path / "metrics.json")
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scaling_factor": null}', "not json"])
def test_unusable_statistics_are_one_clear_error(text, model, tmp_path):
    (tmp_path / "statistics.json").write_text(text)
    with pytest.raises(RecipeError, match=r"statistics\.json"):
        export(model, tmp_path / "vae", statistics=tmp_path / "statistics.json")
    assert not (tmp_path / "vae").exists()


def test_card_snippets_run(model, run_snippets, tmp_path):
    export(model, tmp_path / "vae", scaling_factor=0.5, shift_factor=0.1)
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    found = run_snippets(tmp_path / "vae", images)
    assert len(found) == 2  # with diffusers, and with latentae
    for names in found:
        assert names["latents"].shape == (1, 4, 4, 6)
        assert names["decoded"].shape == images.shape


def test_card_says_what_the_latents_are(model, tmp_path):
    export(model, tmp_path / "my-vae", variant="fp16")
    card = (tmp_path / "my-vae/README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "# my-vae" in card
    assert "4 x H/8 x W/8; 4 x 32 x 32 for 256 x 256 pixels" in card
    assert "range [-1, 1]" in card
    assert 'variant="fp16"' in card
    assert str(tmp_path) not in card


def test_same_export_again_says_so(model, tmp_path, capsys):
    first = export(model, tmp_path / "vae", variant="fp16")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "vae").iterdir()}
    capsys.readouterr()
    assert export(model, tmp_path / "vae", variant="fp16") == first
    assert "already holds this export" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "vae").iterdir()} == before


def test_another_export_into_the_folder_is_refused(model, save_model, tmp_path):
    export(model, tmp_path / "vae")
    with pytest.raises(OutputError, match="variant was not set and is now 'fp16'"):
        export(model, tmp_path / "vae", variant="fp16")
    with pytest.raises(OutputError, match="holds another export job"):
        export(save_model(tmp_path / "other", config_of("kl-f8"), seed=1), tmp_path / "vae")
    with pytest.raises(OutputError):
        export(model, model)
    (tmp_path / "vae/config.json").unlink()
    with pytest.raises(OutputError, match=r"config\.json is missing or damaged"):
        export(model, tmp_path / "vae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        export(model, tmp_path / "full")
    assert (tmp_path / "full/thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty")
    assert {path.name for path in (tmp_path / "empty").iterdir()} == FILES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "tflite"}, "format is 'tflite', expected one of diffusers"),
        ({"variant": "int4"}, "variant is 'int4', expected one of fp16, bf16"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0.0, expected above 0"),
        ({"scaling_factor": float("nan")}, "expected a finite number"),
        ({"shift_factor": float("inf")}, "shift_factor is inf, expected a finite number"),
        ({"metrics": "nowhere.json"}, r"could not read nowhere\.json"),
    ],
)
def test_bad_options_make_no_folder(options, message, model, tmp_path):
    with pytest.raises(RecipeError, match=message):
        export(model, tmp_path / "vae", **options)
    assert not (tmp_path / "vae").exists()


def broken(model: Path, folder: Path, value: float) -> Path:
    AutoencoderKL.from_pretrained(model).save_pretrained(folder)
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state["decoder.conv_out.bias"][1] = value
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_are_not_finite_leave_nothing(model, tmp_path):
    with pytest.raises(ModelError, match=r"decoder\.conv_out\.bias"):
        export(broken(model, tmp_path / "nan", float("nan")), tmp_path / "vae")
    with pytest.raises(ModelError, match="float16"):
        export(broken(model, tmp_path / "large", 1e6), tmp_path / "vae", variant="fp16")
    assert {path.name for path in tmp_path.iterdir()} == {"nan", "large"}
