"""Weights that a training starts with; test_pretrained_files.py has all types of files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from small_models import dc_config, equal, images_of, weights_that_do_not_learn

from latentae.errors import ModelError
from latentae.files import write_json, write_text
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.discriminator import PatchDiscriminator
from latentae.models.initialization import (
    load_discriminator,
    load_initial,
    set_deterministic,
    set_initial_logvar,
    start_linear,
)
from latentae.models.ldm import to_ldm
from latentae.models.linear import LinearAutoencoder
from latentae.models.presets import preset
from latentae.models.pretrained import resolve_model, save_weights

CONFIG = preset("kl-f4", block_out_channels=(32, 32, 64), layers_per_block=1)


@pytest.fixture
def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(CONFIG)


@pytest.fixture
def ldm(autoencoder) -> dict[str, torch.Tensor]:
    return {key: value.contiguous() for key, value in to_ldm(autoencoder.state_dict(), CONFIG).items()}


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
    assert equal(initial.state, autoencoder)
    assert initial.fingerprint == resolve_model(path).fingerprint
    assert equal(initial.discriminator, discriminator) if playing else initial.discriminator is None


def test_a_diffusers_folder_or_file_gives_its_weights_in_fp32(autoencoder, tmp_path):
    autoencoder.to(torch.float16).save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        initial = load_initial(path)
        assert initial.config == CONFIG
        assert equal(initial.state, autoencoder.float())
        assert initial.discriminator is None


@pytest.mark.parametrize(("suffix", "nested"), [(".safetensors", False), (".ckpt", True), (".pt", False)])
def test_an_ldm_file_gives_its_weights_its_discriminator_and_follows_a_config(
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
    assert equal(initial.state, autoencoder)
    assert initial.discriminator is None
    assert initial.fingerprint == load_initial(file).fingerprint == resolve_model(file).fingerprint
    assert resolve_model(file).kind == "file"

    main = {
        key.replace("layers.", "loss.discriminator.main."): value
        for key, value in discriminator.state_dict().items()
    }
    write({**ldm, **main, "loss.discriminator.main.3.running_mean": torch.zeros(16)})
    found, fresh = load_initial(file).discriminator, PatchDiscriminator(3, 8, 2)
    assert equal(found, discriminator)
    assert load_discriminator(fresh, found) is None
    assert equal(found, fresh)

    config = CONFIG.model_copy(update={"norm_num_groups": 16, "scaling_factor": 0.5})
    write_json(tmp_path / "config.json", config.diffusers_dict())
    assert load_initial(file).config == config

    ldm.pop("decoder.norm_out.bias")
    write(ldm)
    with pytest.raises(ModelError, match=r"model\.\w+: it lacks decoder.norm_out.bias"):
        load_initial(file)


def test_a_discriminator_that_does_not_fit_is_left_unchanged():
    module = PatchDiscriminator(3, 8, 2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert "lacks layers.3.weight" in str(
        load_discriminator(module, PatchDiscriminator(3, 8, 2, "none").state_dict())
    )
    assert "shape (16, 3, 4, 4)" in str(load_discriminator(module, PatchDiscriminator(3, 16, 2).state_dict()))
    assert "unknown more" in str(load_discriminator(module, {**before, "more": torch.zeros(1)}))
    assert equal(before, module)


def model(name: str = "tiny") -> AutoencoderKL:
    widths = (16, 32, 64) if name == "tiny" else (16, 16, 32, 32)
    return AutoencoderKL(preset(name, block_out_channels=widths, norm_num_groups=4))


def test_residual_branches_and_attention_add_nothing():
    autoencoder = model("kl-f8")
    start_linear(autoencoder)
    block, attention = autoencoder.encoder.mid_block.resnets[0], autoencoder.encoder.mid_block.attentions[0]
    x = torch.randn(1, 32, 4, 4)
    assert torch.equal(block(x), x)
    assert torch.equal(attention(x), x)


def test_the_trunk_keeps_the_variance_of_its_input():
    autoencoder = model()
    start_linear(autoencoder)
    x = torch.randn(4, 3, 64, 64)
    h = autoencoder.encoder.conv_in(x)
    for level in autoencoder.encoder.down_blocks:
        h = level(h)
    assert 0.5 < h.var().item() < 2


def test_every_weight_can_still_learn():
    autoencoder = model()
    start_linear(autoencoder)
    assert weights_that_do_not_learn(autoencoder, torch.randn(2, 3, 32, 32)) == []


def test_initial_logvar_is_a_shift():
    autoencoder, x = model(), torch.randn(1, 3, 32, 32)
    before = autoencoder.encode(x)
    set_initial_logvar(autoencoder, -6.0)
    after = autoencoder.encode(x)
    torch.testing.assert_close(after.logvar, before.logvar - 6)
    torch.testing.assert_close(after.mean, before.mean)


@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_a_linear_start_is_linear_up_to_the_latent_and_keeps_the_variance(norm):
    config = dc_config(bottleneck="gaussian", decoder_norm_types=norm, encoder_layers_per_block=(2, 2, 2))
    model = AutoencoderDC(config).double().eval()
    start_linear(model)
    a, b = (torch.randn(2, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        means = model.encode(a).mean, model.encode(b).mean, model.encode(2 * a - 3 * b).mean
        torch.testing.assert_close(means[2], 2 * means[0] - 3 * means[1], rtol=1e-10, atol=1e-10)
        assert (model.encode(a).logvar == 0).all()
        assert 0.2 < means[0].std() < 4
        decoded = model.decode(means[0] / means[0].std())
    assert 0.2 < decoded.std() < 4
    model(a).reconstruction.square().mean().backward()  # and branches come alive in the next step
    last = ("norm.weight", "attn.norm_out.weight")
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name.endswith(last))


def test_the_spread_at_the_start_can_be_set_where_there_is_a_posterior():
    model = AutoencoderDC(dc_config(bottleneck="gaussian"))
    x = images_of(model, 3)
    set_initial_logvar(model, -6.0)
    torch.testing.assert_close(model.encode(x).logvar, torch.full((2, 4, 3, 3), -6.0))
    torch.nn.init.normal_(model.encoder.conv_out_logvar.weight)
    set_deterministic(model)
    assert (model.encode(x).logvar == -30).all()
    model = AutoencoderDC(dc_config())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_deterministic(model)
    set_initial_logvar(model, 0.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ModelError, match="log-variance is -6, but a AutoencoderDC without a posterior"):
        set_initial_logvar(model, -6.0)
    with pytest.raises(ModelError, match="no linear start"):
        start_linear(LinearAutoencoder(LinearAutoencoderConfig()))
