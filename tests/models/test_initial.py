"""Weights that a training begins with; tests/models/test_pretrained_files.py has files of every kind and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from latentae.errors import ModelError
from latentae.files import write_json, write_text
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.discriminator import PatchDiscriminator
from latentae.models.initialization import load_discriminator, load_initial
from latentae.models.ldm import to_ldm
from latentae.models.presets import preset
from latentae.models.pretrained import resolve_model, save_weights

CONFIG = preset("kl-f4", block_out_channels=(32, 32, 64), layers_per_block=1)


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(CONFIG)


@pytest.fixture
def ldm(autoencoder) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in to_ldm(autoencoder.state_dict(), CONFIG).items()}


def same(found: dict[str, torch.Tensor], model: torch.nn.Module) -> bool:
    expected = model.state_dict()
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize(("what", "playing"), [("run", True), ("run", False), ("checkpoint", True)])
def test_a_run_gives_its_average_and_its_discriminator(autoencoder, what, playing, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    discriminator = PatchDiscriminator(3, 8, 2)
    save_weights(AutoencoderKL(CONFIG).state_dict(), folder / "autoencoder.safetensors")
    save_weights(autoencoder.state_dict(), folder / "ema.safetensors")
    if playing:
        save_weights(discriminator.state_dict(), folder / "discriminator.safetensors")
    write_json(folder / "config.json", CONFIG.diffusers_dict())
    write_json(folder / "meta.json", {"resolution": 64})
    write_text(folder.with_name("latest"), folder.name + "\n")
    path = tmp_path / "run" if what == "run" else folder
    initial = load_initial(path)
    assert initial.config == CONFIG
    assert same(initial.state, autoencoder)
    assert initial.fingerprint == resolve_model(path).fingerprint
    assert same(initial.discriminator, discriminator) if playing else initial.discriminator is None


def test_a_diffusers_folder_or_file_gives_its_weights_in_fp32(autoencoder, tmp_path):
    autoencoder.to(torch.float16).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        initial = load_initial(path)
        assert initial.config == CONFIG
        assert same(initial.state, autoencoder.float())
        assert initial.discriminator is None


@pytest.mark.parametrize(("suffix", "nested"), [(".safetensors", False), (".ckpt", True), (".pt", False)])
def test_an_ldm_file_gives_its_weights_its_discriminator_and_believes_the_config_beside_it(
    autoencoder, ldm, suffix, nested, tmp_path
):
    discriminator, file = PatchDiscriminator(3, 8, 2), tmp_path / f"model{suffix}"

    def write(tensors):
        if suffix == ".safetensors":
            save_file(tensors, file)
        else:
            torch.save({"state_dict": tensors, "global_step": 5} if nested else tensors, file)

    write(ldm)
    initial = load_initial(file)
    assert initial.config == CONFIG
    assert same(initial.state, autoencoder)
    assert initial.discriminator is None
    assert initial.fingerprint == load_initial(file).fingerprint == resolve_model(file).fingerprint
    assert resolve_model(file).kind == "file"

    main = {
        key.replace("layers.", "loss.discriminator.main."): value
        for key, value in discriminator.state_dict().items()
    }
    write({**ldm, **main, "loss.discriminator.main.3.running_mean": torch.zeros(16)})
    found, fresh = load_initial(file).discriminator, PatchDiscriminator(3, 8, 2)
    assert same(found, discriminator)
    assert load_discriminator(fresh, found) is None
    assert same(found, fresh)

    config = CONFIG.model_copy(update={"norm_num_groups": 16, "scaling_factor": 0.5})
    write_json(tmp_path / "config.json", config.diffusers_dict())
    assert load_initial(file).config == config

    ldm.pop("decoder.norm_out.bias")
    write(ldm)
    with pytest.raises(ModelError, match=r"model\.\w+: it lacks decoder.norm_out.bias"):
        load_initial(file)


def test_a_discriminator_that_does_not_fit_is_left_as_it_is():
    module = PatchDiscriminator(3, 8, 2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert "lacks layers.3.weight" in str(
        load_discriminator(module, PatchDiscriminator(3, 8, 2, "none").state_dict())
    )
    assert "shape (16, 3, 4, 4)" in str(load_discriminator(module, PatchDiscriminator(3, 16, 2).state_dict()))
    assert "unknown more" in str(load_discriminator(module, {**before, "more": torch.zeros(1)}))
    assert same(before, module)
