from __future__ import annotations

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from latentae.errors import ModelError
from latentae.files import write_json, write_text
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import preset
from latentae.models.discriminator import PatchDiscriminator
from latentae.models.initial import load_discriminator, load_initial
from latentae.models.ldm import to_ldm
from latentae.models.pretrained import load_model, resolve_model, save_weights

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


def write_checkpoint(folder, raw, ema, discriminator=None):
    save_weights(raw.state_dict(), folder / "autoencoder.safetensors")
    save_weights(ema.state_dict(), folder / "ema.safetensors")
    if discriminator is not None:
        save_weights(discriminator.state_dict(), folder / "discriminator.safetensors")
    write_json(folder / "config.json", raw.config.diffusers_dict())
    write_json(folder / "meta.json", {"resolution": 64})


@pytest.mark.parametrize("what", ["run", "checkpoint"])
@pytest.mark.parametrize("playing", [True, False])
def test_a_run_gives_its_average_and_its_discriminator(autoencoder, what, playing, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-00000007"
    discriminator = PatchDiscriminator(3, 8, 2) if playing else None
    write_checkpoint(folder, AutoencoderKL(CONFIG), autoencoder, discriminator)
    write_text(folder.with_name("latest"), folder.name + "\n")
    path = tmp_path / "run" if what == "run" else folder
    initial = load_initial(path)
    assert initial.config == CONFIG
    assert same(initial.state, autoencoder)
    assert initial.fingerprint == resolve_model(path).fingerprint
    if discriminator is None:
        assert initial.discriminator is None
    else:
        assert initial.discriminator is not None
        assert same(initial.discriminator, discriminator)


def test_a_diffusers_folder_or_file_gives_its_weights_in_fp32(autoencoder, tmp_path):
    autoencoder.to(torch.float16).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        initial = load_initial(path)
        assert initial.config == CONFIG
        assert same(initial.state, autoencoder.float())
        assert initial.discriminator is None


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth"])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_ldm_file_gives_its_weights(autoencoder, ldm, suffix, nested, prefix, tmp_path):
    file = tmp_path / f"model{suffix}"
    tensors = {prefix + key: value for key, value in ldm.items()}
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save({"state_dict": tensors, "global_step": 5} if nested else tensors, file)
    initial = load_initial(file)
    assert initial.config == CONFIG
    assert same(initial.state, autoencoder)
    assert initial.discriminator is None
    assert initial.fingerprint == load_initial(file).fingerprint


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_ldm_file_gives_its_discriminator(autoencoder, ldm, suffix, tmp_path):
    discriminator = PatchDiscriminator(3, 8, 2)
    main = {key.replace("layers.", "loss.discriminator.main."): value for key, value in discriminator.state_dict().items()}
    main["loss.discriminator.main.3.running_mean"] = torch.zeros(16)
    file = tmp_path / f"model{suffix}"
    save_file({**ldm, **main}, file) if suffix == ".safetensors" else torch.save({**ldm, **main}, file)
    found = load_initial(file).discriminator
    assert found is not None
    assert same(found, discriminator)
    fresh = PatchDiscriminator(3, 8, 2)
    assert load_discriminator(fresh, found) is None
    assert same(found, fresh)


def test_a_config_beside_an_ldm_file_is_believed(autoencoder, ldm, tmp_path):
    config = CONFIG.model_copy(update={"norm_num_groups": 16, "scaling_factor": 0.5})
    write_json(tmp_path / "config.json", config.diffusers_dict())
    save_file(ldm, tmp_path / "a.safetensors")
    torch.save(ldm, tmp_path / "a.ckpt")
    assert load_initial(tmp_path / "a.safetensors").config == config
    assert load_initial(tmp_path / "a.ckpt").config == config


def test_an_ldm_safetensors_file_is_a_model_for_every_verb(autoencoder, ldm, tmp_path):
    save_file({f"vae.{key}": value for key, value in ldm.items()}, tmp_path / "ldm.safetensors")
    model, source = load_model(tmp_path / "ldm.safetensors")
    assert source.kind == "file"
    assert source.config == CONFIG
    assert same(model.state_dict(), autoencoder)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def hostile_legacy(file, made):
    file.write_bytes(pickle.dumps({"state_dict": {"encoder.conv_in.weight": Hostile(made)}}))


def hostile_archive(file, made):
    torch.save({"state_dict": {"encoder.conv_in.weight": Hostile(made)}}, file)


def truncated(file, made):
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(64, 64)}}, file)
    file.write_bytes(file.read_bytes()[:-500])


def empty(file, made):
    file.write_bytes(b"")


def archive_without_pickle(file, made):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/readme.txt", "nothing here")


def a_list(file, made):
    torch.save([torch.zeros(3)], file)


def other_weights(file, made):
    torch.save({"state_dict": {"fc.weight": torch.zeros(3), 5: torch.zeros(1)}}, file)


def claimed_terabytes(file, made):
    one, side = torch.zeros(1), 2**20
    names = (
        "encoder.mid.block_1.conv1",
        "encoder.down.0.block.0.conv1",
        "encoder.conv_in",
        "encoder.conv_out",
        "decoder.conv_in",
    )
    torch.save({f"{name}.weight": one.expand(side, side, 3, 3) for name in names}, file)


@pytest.mark.parametrize(
    "write", [claimed_terabytes, hostile_legacy, hostile_archive, truncated, empty, archive_without_pickle, a_list, other_weights]
)
def test_a_hostile_or_damaged_pickle_is_refused_in_one_line(write, tmp_path):
    file, made = tmp_path / "model.ckpt", tmp_path / "made"
    write(file, made)
    with pytest.raises(ModelError, match=r"model\.ckpt") as caught:
        load_initial(file)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert not made.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_incomplete_ldm_file_names_itself_and_what_is_missing(ldm, suffix, tmp_path):
    ldm.pop("decoder.norm_out.bias")
    file = tmp_path / f"model{suffix}"
    save_file(ldm, file) if suffix == ".safetensors" else torch.save(ldm, file)
    with pytest.raises(ModelError, match=r"model\.\w+: the LDM file has no decoder.norm_out.bias"):
        load_initial(file)


def test_a_folder_whose_weights_are_of_another_shape_is_refused(autoencoder, tmp_path):
    autoencoder.save_pretrained(tmp_path)
    write_json(tmp_path / "config.json", CONFIG.model_copy(update={"latent_channels": 8}).diffusers_dict())
    with pytest.raises(ModelError, match="latent_channels = 8"):
        load_initial(tmp_path)


def test_other_weights_without_a_config_are_refused_with_the_reason(tmp_path):
    save_weights({"fc.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match=r"no config\.json beside it"):
        load_initial(tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        load_initial(tmp_path / "nowhere.ckpt")


def test_a_discriminator_that_does_not_fit_is_left_as_it_is():
    module = PatchDiscriminator(3, 8, 2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert "lacks layers.3.weight" in str(load_discriminator(module, PatchDiscriminator(3, 8, 2, "none").state_dict()))
    assert "shape (16, 3, 4, 4)" in str(load_discriminator(module, PatchDiscriminator(3, 16, 2).state_dict()))
    assert "unknown more" in str(load_discriminator(module, {**before, "more": torch.zeros(1)}))
    assert same(before, module)
