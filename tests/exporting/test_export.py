from __future__ import annotations

import importlib
import json
import logging
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentae import AutoencoderKL, AutoencoderKLConfig, export
from latentae.errors import ModelError, OutputError, RecipeError
from latentae.files import read_json, write_json
from latentae.models.config import preset
from latentae.models.pretrained import resolve_model

FILES = {"README.md", "config.json", "diffusion_pytorch_model.safetensors", "latentae.json"}
SHAPES = {
    "plain": {"norm_num_groups": 4, "block_out_channels": (8, 16), "mid_block_add_attention": False, "use_quant_conv": False},
    "kl-f8": {"norm_num_groups": 4, "block_out_channels": (8, 8, 16, 16)},
    "kl-f16": {"norm_num_groups": 4, "block_out_channels": (8, 8, 8, 8, 16)},
}


def make(folder: Path, shape: str = "kl-f8", seed: int = 0) -> Path:
    """A model folder with small random weights, stored channels_last as training leaves it."""
    torch.manual_seed(seed)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = AutoencoderKLConfig(**blocks, **SHAPES[shape]) if shape == "plain" else preset(shape, **SHAPES[shape])
    autoencoder = AutoencoderKL(config).to(memory_format=torch.channels_last)
    with torch.no_grad():
        autoencoder.decoder.conv_out.weight.div_(5)  # decodes to about [-1, 1], as a trained model does
    autoencoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def diffusers() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what diffusers' own imports warn of is not ours
        module = importlib.import_module("diffusers")
        assert module.AutoencoderKL
    return module


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_loads_it_without_a_word(shape, diffusers, tmp_path, caplog, capfd):
    """No missing, unexpected or renamed key, no warning or log line, and the same reconstruction."""
    model = make(tmp_path / "model", shape)
    export(model, tmp_path / "vae")
    capfd.readouterr()
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        theirs, report = diffusers.AutoencoderKL.from_pretrained(
            tmp_path / "vae", output_loading_info=True, low_cpu_mem_usage=False, local_files_only=True
        )
    assert not any(report.values())
    assert not caplog.records
    assert not capfd.readouterr().err
    assert theirs.dtype == torch.float32

    ours = AutoencoderKL.from_pretrained(model)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = ours(x, sample_posterior=False)
        posterior = theirs.eval().encode(x).latent_dist
        torch.testing.assert_close(posterior.mean, expected.posterior.mean, rtol=0, atol=1e-5)
        torch.testing.assert_close(posterior.logvar, expected.posterior.logvar, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs.decode(posterior.mode()).sample, expected.reconstruction, rtol=0, atol=1e-5)


def test_config_has_exactly_diffusers_keys(model, diffusers, tmp_path):
    export(model, tmp_path / "vae")
    config = read_json(tmp_path / "vae/config.json")
    theirs = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).config
    assert set(config) == {"_class_name", "_diffusers_version"} | {key for key in theirs if not key.startswith("_")}
    assert config["_class_name"] == "AutoencoderKL"
    assert config["shift_factor"] == 0.0
    assert config["force_upcast"] is True
    assert config["sample_size"] == 256


def test_folder_holds_no_more_than_it_says_and_loads_back_bit_for_bit(model, tmp_path):
    summary = export(model, tmp_path / "vae")
    assert {path.name for path in (tmp_path / "vae").iterdir()} == FILES
    assert set(summary["files"]) == FILES - {"latentae.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]
    one, two = AutoencoderKL.from_pretrained(model).state_dict(), AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_equal_weights_give_equal_bytes(model, tmp_path):
    for name in ("a", "b"):
        export(model, tmp_path / name / "vae", variant="fp16")
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name / "vae").iterdir()} for name in ("a", "b"))
    assert first == second
    # and as those of the model, which went through channels_last
    assert first["diffusion_pytorch_model.safetensors"] == (model / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variant_loads_in_diffusers(variant, dtype, model, diffusers, tmp_path):
    export(model, tmp_path / "vae", variant=variant)
    stored = load_file(tmp_path / f"vae/diffusion_pytorch_model.{variant}.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae", variant=variant, torch_dtype=dtype)
    assert theirs.dtype == dtype
    for key, value in AutoencoderKL.from_pretrained(model).state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value.to(dtype))


def test_it_works_in_a_pipeline_folder(model, diffusers, tmp_path):
    """What a pipeline does with a component: find it by class name in `vae/`."""
    export(model, tmp_path / "pipeline/vae")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "pipeline", subfolder="vae")
    assert resolve_model(tmp_path / "pipeline").kind == "folder"
    assert vae.config.latent_channels == 4


@pytest.mark.parametrize(("sample_size", "expected"), [(64, 256), (256, 256), (300, 304), (512, 512)])
def test_sample_size_is_the_resolution_but_no_small_tile(sample_size, expected, model, tmp_path):
    source = tmp_path / "model"
    AutoencoderKL.from_pretrained(model).save_pretrained(source)
    write_json(source / "config.json", {**read_json(source / "config.json"), "sample_size": sample_size})
    export(source, tmp_path / "vae")
    assert read_json(tmp_path / "vae/config.json")["sample_size"] == expected


def statistics(model: Path, **changes: object) -> dict[str, object]:
    """As encode writes them."""
    values = {"model": resolve_model(model).fingerprint, "samples": 500, "scaling_factor": 0.75, "shift_factor": -0.125}
    return {**values, "latents_mean": [0.5, -0.5, 0.25, -0.75], "latents_std": [1.0, 1.5, 0.5, 2.0], **changes}


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
    source = tmp_path / "model"
    AutoencoderKL.from_pretrained(model).save_pretrained(source)
    by_channel = {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}
    write_json(source / "config.json", {**read_json(source / "config.json"), **by_channel})
    export(source, tmp_path / "inherited")
    assert read_json(tmp_path / "inherited/config.json")["latents_std"] == [2.0] * 4
    assert "(z - latents_mean) * scaling_factor / latents_std" in (tmp_path / "inherited/README.md").read_text()
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
        "latent": {"channel_mean": [0.0] * 4, "channel_std": [1.0] * 4, "scaling_factor": 0.5, "shift_factor": 0.0},
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


def test_numbers_of_another_model_are_refused(model, tmp_path):
    other = make(tmp_path / "other", seed=1)
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


@pytest.mark.parametrize("loader", ["diffusers", "latentae"])
def test_card_snippets_run(loader, model, diffusers, tmp_path, monkeypatch):
    export(model, tmp_path / "vae", scaling_factor=0.5, shift_factor=0.1)
    monkeypatch.chdir(tmp_path)
    snippets = (tmp_path / "vae/README.md").read_text().split("```python\n")[1:]
    code = next(s.split("```")[0] for s in snippets if f"from {loader} import" in s)
    names = {"images": torch.rand(1, 3, 32, 48) * 2 - 1}
    exec(code, names)
    assert names["latents"].shape == (1, 4, 4, 6)
    assert names["decoded"].shape == names["images"].shape


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


def test_another_export_into_the_folder_is_refused(model, tmp_path):
    export(model, tmp_path / "vae")
    with pytest.raises(OutputError, match="variant is None there and 'fp16' here"):
        export(model, tmp_path / "vae", variant="fp16")
    with pytest.raises(OutputError, match="holds another export job"):
        export(make(tmp_path / "other", seed=1), tmp_path / "vae")
    with pytest.raises(OutputError):
        export(model, model)
    (tmp_path / "vae/config.json").unlink()
    with pytest.raises(OutputError, match=r"config\.json is missing or damaged"):
        export(model, tmp_path / "vae")


def test_foreign_folder_is_refused_and_empty_one_is_used(model, tmp_path):
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
        ({"scaling_factor": 0.0}, "positive number"),
        ({"scaling_factor": float("nan")}, "positive number"),
        ({"shift_factor": float("inf")}, "finite number"),
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


def test_record_holds_provenance(model, tmp_path):
    export(model, tmp_path / "vae")
    record = read_json(tmp_path / "vae/latentae.json")
    assert record["verb"] == "export"
    assert record["finished"] is True
    assert record["inputs"]["model"] == resolve_model(model).fingerprint
    assert record["parameters"] == sum(p.numel() for p in AutoencoderKL.from_pretrained(model).parameters())
    assert str(tmp_path) not in json.dumps(record)


def test_it_reconstructs_the_same_where_latentae_is_not_installed(model, tmp_path):
    import subprocess
    import sys

    export(model, tmp_path / "vae")
    ours = AutoencoderKL.from_pretrained(model)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = ours.decode(ours.encode(x).mode())
    torch.save({"x": x, "expected": expected}, tmp_path / "tensors.pt")
    code = (
        "import sys\n"
        "sys.modules['latentae'] = sys.modules['latentae_kernels'] = None  # importing either fails\n"
        "import torch\nfrom diffusers import AutoencoderKL\n"
        f"saved = torch.load({str(tmp_path / 'tensors.pt')!r}, weights_only=True)\n"
        f"vae = AutoencoderKL.from_pretrained({str(tmp_path / 'vae')!r})\n"
        "with torch.no_grad(): got = vae.decode(vae.encode(saved['x']).latent_dist.mode()).sample\n"
        "print((got - saved['expected']).abs().max().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1e-5


def test_only_an_autoencoder_kl_is_a_component(tmp_path):
    from latentae.models.config import LinearAutoencoderConfig
    from latentae.models.linear import LinearAutoencoder

    LinearAutoencoder(LinearAutoencoderConfig()).save_pretrained(tmp_path / "linear")
    with pytest.raises(ModelError, match="is a LinearAutoencoder; what others load is an AutoencoderKL"):
        export(tmp_path / "linear", tmp_path / "vae")
    assert not (tmp_path / "vae").exists()
