"""Every format reloaded by its own loader, and the card's snippets run as printed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentae import AutoencoderKL, export
from latentae.errors import MissingDependencyError, ModelError, RecipeError
from latentae.exporting.formats import write_diffusers
from latentae.exporting.scaling import MeasuredLatents
from latentae.files import read_json, write_json, write_text
from latentae.models.config import AutoencoderKLConfig
from latentae.models.discriminator import PatchDiscriminator
from latentae.models.initialization import load_initial
from latentae.models.ldm import to_ldm
from latentae.models.presets import preset
from latentae.models.pretrained import resolve_model, save_weights

NARROW = preset("kl-f8", block_out_channels=(32, 32, 32, 32), layers_per_block=1)
SMALL = preset("tiny", block_out_channels=(8, 8, 16), sample_size=32)
RECIPE = """
images = 100
[data]
shards = "/home/someone/shards"
[loss.adversarial]
weight = 0.5
channels = 8
layers = 2
backbone_weights = "/home/someone/backbone.pth"
"""


WITHOUT_LATENTAE = """
import sys
sys.modules["latentae"] = sys.modules["latentae_kernels"] = None  # importing either fails
import torch
from diffusers import AutoencoderKL
saved = torch.load("tensors.pt", weights_only=True)
for options in ({}, {"variant": "fp16"}):
    vae = AutoencoderKL.from_pretrained("vae", **options).float()
    with torch.no_grad(): got = vae.decode(vae.encode(saved["x"]).latent_dist.mode()).sample
    print((got - saved["expected"]).abs().max().item())
"""


def make_run(folder: Path, config: AutoencoderKLConfig = SMALL) -> Path:
    """A run folder as training leaves it, with a discriminator and something that the losses
    learned.
    """
    checkpoint = folder / "checkpoints/step-00000007"
    checkpoint.mkdir(parents=True)
    save_weights(AutoencoderKL(config).state_dict(), checkpoint / "autoencoder.safetensors")
    save_weights(AutoencoderKL(config).state_dict(), checkpoint / "ema.safetensors")
    save_weights(PatchDiscriminator(3, 8, 2).state_dict(), checkpoint / "discriminator.safetensors")
    save_weights({"logvar": torch.tensor(-0.5)}, checkpoint / "objective.safetensors")
    write_json(checkpoint / "config.json", config.diffusers_dict())
    write_text(checkpoint / "recipe.toml", RECIPE)
    write_json(
        checkpoint / "meta.json", {"latentae": "0.1.0", "step": 7, "images_seen": 56, "resolution": 32}
    )
    lines = [
        '{"step": 5, "images": 40, "validation/psnr": 19.0}',
        '{"step": 7, "images": 56, "loss/total": 1.0}',
    ]
    last = '{"step": 7, "images": 56, "validation/psnr": 21.25, "validation/ssim": 0.5, '
    last += '"validation/perceptual": null}'
    write_text(folder / "metrics.jsonl", "\n".join([*lines, last]) + "\n")
    write_text(folder / "checkpoints/latest", checkpoint.name + "\n")
    return folder


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def small(save_model, tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("small") / "model", SMALL)


@pytest.fixture(scope="module")
def ldm_export(save_model, tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("ldm")
    model = save_model(root / "model", NARROW)
    export(model, root / "vae", format="ldm")
    return model, root / "vae"


def test_the_ldm_file_is_the_model_bit_for_bit_and_comes_back(ldm_export, tmp_path):
    model, folder = ldm_export
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "latentae.json",
        "vae.ldm.safetensors",
    }
    original = AutoencoderKL.from_pretrained(model)
    tensors = load_file(folder / "vae.ldm.safetensors")
    assert equal(tensors, to_ldm(original.state_dict(), original.config))
    assert "encoder.mid.attn_1.q.weight" in tensors
    lone = tmp_path / "x.safetensors"
    lone.write_bytes((folder / "vae.ldm.safetensors").read_bytes())
    for path in (folder, folder / "vae.ldm.safetensors", lone):
        assert equal(AutoencoderKL.from_pretrained(path).state_dict(), original.state_dict())


def test_the_ldm_card_runs_and_gives_the_same_images(ldm_export, run_snippets):
    model, folder = ldm_export
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    ours, theirs = run_snippets(folder, images)
    original = AutoencoderKL.from_pretrained(model)
    with torch.no_grad():
        expected = original.decode(original.encode(images).mode()).clamp(-1, 1)
    assert ours["decoded"].shape == images.shape
    torch.testing.assert_close(theirs["decoded"], expected, rtol=0, atol=1e-5)


def test_onnx_runs_as_the_card_says(onnx_export, run_snippets):
    model, folder = onnx_export
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    coders = {
        f"vae_{coder}/{name}" for coder in ("encoder", "decoder") for name in ("model.onnx", "config.json")
    }
    assert names == {"README.md", "latentae.json", *coders}
    assert set(read_json(folder / "latentae.json")["files"]) == names - {"latentae.json"}
    assert read_json(folder / "vae_decoder/config.json")["scaling_factor"] == 0.5
    images = torch.rand(3, 3, 24, 40) * 2 - 1
    (found,) = run_snippets(folder, images)
    with torch.no_grad():
        latent = model.encode(images).mode()
        np.testing.assert_allclose(found["latents"], (latent - 0.1) * 0.5, rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["decoded"], model.decode(latent), rtol=0, atol=1e-4)


def test_onnx_without_its_packages_is_one_line_and_no_folder(small, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnx" else find(name, *rest)
    )
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentae\[export\]'"):
        export(small, tmp_path / "vae", format="onnx")
    assert not (tmp_path / "vae").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("cpp_compiler")
def test_all_of_a_run(photo_shards, run_snippets, tmp_path):
    """Everything in one folder: each loader gives the model's own images, and the card's snippets
    run.
    """
    pytest.importorskip("onnxruntime")
    run = make_run(tmp_path / "run")
    options = {
        "format": "all",
        "fold_normalization": True,
        "variant": "fp16",
        "data": photo_shards,
        "perceptual": "none",
    }
    summary = export(run, tmp_path / "vae", **options)
    assert set(summary["files"]) == {
        "README.md", "config.json", "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors", "vae.ldm.safetensors", "vae_encoder/model.onnx",
        "vae_encoder/config.json", "vae_decoder/model.onnx", "vae_decoder/config.json", "pt2/encoder.pt2",
        "pt2/decoder.pt2", "latent_preview.json", "latent_statistics.json",
        "training/discriminator.safetensors", "training/objective.safetensors", "training/training.json",
    }  # fmt: skip
    assert export(run, tmp_path / "vae", **options) == summary
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    found = run_snippets(tmp_path / "vae", images)
    assert len(found) == 6
    original = AutoencoderKL.from_pretrained(run)
    with torch.no_grad():
        expected = original.decode(original.encode(images).mode()).clamp(-1, 1)
    for names, loader in zip(found[2:5], ("ldm", "onnx", "pt2"), strict=True):
        decoded = torch.as_tensor(names["decoded"]).clamp(-1, 1)
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4, msg=loader)
    assert found[5]["rgb"].shape == (2, 3, 8, 12)


def test_a_diffusers_only_environment_loads_the_folded_variant(save_model, tmp_path):
    model = save_model(tmp_path / "model", NARROW)
    latents = MeasuredLatents(1.0, 0.0, (0.5, -1.0, 0.0, 2.0), (0.5, 2.0, 1.0, 4.0), images=9)
    write_json(tmp_path / "statistics.json", latents.to_json(resolve_model(model).fingerprint))
    export(
        model,
        tmp_path / "vae",
        variant="fp16",
        fold_normalization=True,
        statistics=tmp_path / "statistics.json",
    )
    original = AutoencoderKL.from_pretrained(model)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = original.decode(original.encode(x).mode())
    torch.save({"x": x, "expected": expected}, tmp_path / "tensors.pt")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_LATENTAE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    full, half = map(float, done.stdout.split())
    assert full <= 1e-4
    assert half <= 5e-2


def test_what_a_training_needs_comes_along_without_its_machine(tmp_path, monkeypatch):
    # the other formats take a minute
    monkeypatch.setattr("latentae.exporting.export.write_formats", write_plain)
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "vae", format="all")
    training = tmp_path / "vae/training"
    checkpoint = run / "checkpoints/step-00000007"
    for name in ("discriminator.safetensors", "objective.safetensors"):
        assert (training / name).read_bytes() == (checkpoint / name).read_bytes()
    note = read_json(training / "training.json")
    assert (note["step"], note["images_seen"]) == (7, 56)
    assert note["loss"]["adversarial"] == {"weight": 0.5, "channels": 8, "layers": 2}
    for path in (tmp_path / "vae").rglob("*"):
        if path.is_file():
            assert b"/home/someone" not in path.read_bytes()
    card = (tmp_path / "vae/README.md").read_text()
    assert "| discriminator.safetensors | the network trained against |" in card
    initial = load_initial(tmp_path / "vae")
    assert initial.discriminator is not None
    assert equal(initial.discriminator, load_file(checkpoint / "discriminator.safetensors"))


def write_plain(plan, model, config, folder: Path) -> None:
    write_diffusers(model, config, folder)


def test_a_damaged_discriminator_stops_the_export(tmp_path, monkeypatch):
    monkeypatch.setattr("latentae.exporting.export.write_formats", lambda *arguments: None)
    run = make_run(tmp_path / "run")
    file = run / "checkpoints/step-00000007/discriminator.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ModelError, match=r"discriminator\.safetensors"):
        export(run, tmp_path / "vae", format="all")
    assert not (tmp_path / "vae").exists()


def test_without_data_a_run_gives_its_own_validation(tmp_path):
    run = make_run(tmp_path / "run")
    export(run, tmp_path / "vae")
    card = (tmp_path / "vae/README.md").read_text()
    assert "| Images | the run's own held-out ones, at 32 x 32 pixels, after step 7 |" in card
    assert "| PSNR (dB) | 21.25 |\n| SSIM | 0.5 |\n" in card
    assert "Perceptual distance" not in card
    export(run, tmp_path / "raw", weights="raw")
    write_text(
        run / "metrics.jsonl", '{"step": 5, "images": 40, "validation/psnr": 19.0}\n'
    )  # of other weights
    export(run, tmp_path / "other")
    for name in ("raw", "other"):
        assert "Not measured. To measure, export with" in (tmp_path / name / "README.md").read_text()


def test_variants_belong_to_the_diffusers_folder(small, tmp_path):
    with pytest.raises(RecipeError, match="variant fp16 needs format diffusers or all"):
        export(small, tmp_path / "vae", format="ldm", variant="fp16")
