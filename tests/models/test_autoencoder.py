"""AutoencoderKL against diffusers' class: outputs, gradients, folders both ways."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import equal, narrow, randomize_norms

from latentae.errors import ImageError, ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.presets import PRESETS, preset

diffusers = pytest.importorskip("diffusers")


def pair(name: str, dtype: torch.dtype = torch.float64):
    config = narrow(name)
    ours = randomize_norms(AutoencoderKL(config).to(dtype))
    theirs = diffusers.AutoencoderKL(**config.model_dump()).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def run(model, x, noise, theirs: bool):
    model.zero_grad()
    posterior = model.encode(x).latent_dist if theirs else model.encode(x)
    latent = posterior.mean + posterior.std * noise
    image = model.decode(latent).sample if theirs else model.decode(latent)
    kl = posterior.kl()
    (image.square().mean() + 1e-3 * kl.mean()).backward()
    return {"image": image, "mean": posterior.mean, "logvar": posterior.logvar, "kl": kl}, {
        k: p.grad.clone() for k, p in model.named_parameters()
    }


def inputs(config: AutoencoderKLConfig, dtype: torch.dtype):
    side = 2 * config.downsampling
    x = torch.rand(2, 3, side, side + config.downsampling, dtype=torch.float64) * 2 - 1
    noise = torch.randn(2, config.latent_channels, 2, 3, dtype=torch.float64)
    return x.to(dtype), noise.to(dtype)


@pytest.mark.parametrize("name", PRESETS)
def test_state_dict_keys_and_shapes_are_those_of_diffusers(name):
    config = preset(name)
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(config), diffusers.AutoencoderKL(**config.model_dump())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }


@pytest.mark.parametrize("name", PRESETS)
def test_fp64_outputs_and_gradients_equal_diffusers(name):
    ours, theirs = pair(name)
    x, noise = inputs(ours.config, torch.float64)
    values, grads = run(ours, x, noise, theirs=False)
    expected, expected_grads = run(theirs, x, noise, theirs=True)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["kl-f8", "tiny"])
def test_fp32_is_within_twice_the_distance_of_diffusers_from_fp64(name):
    exact, _ = pair(name)
    x, noise = inputs(exact.config, torch.float64)
    truth, true_grads = run(exact, x, noise, theirs=False)
    state = {k: v.float() for k, v in exact.state_dict().items()}
    ours, theirs = pair(name, torch.float32)
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    theirs.to(memory_format=torch.channels_last)  # the native operators round differently in the two orders
    values, grads = run(ours, x.float(), noise.float(), theirs=False)
    expected, expected_grads = run(theirs, x.float(), noise.float(), theirs=True)

    # Norms over many values: the largest error of a few is left to chance, and differs from
    # processor to processor.
    def distance(found, true):
        return torch.stack([(found[key].double() - true[key]).norm() for key in true]).norm().item()

    for key, value in truth.items():
        one = {key: value}
        assert distance(values, one) <= 2 * distance(expected, one) + 1e-6 * value.norm().item(), key
    floor = 1e-6 * torch.stack([value.norm() for value in true_grads.values()]).norm().item()
    assert distance(grads, true_grads) <= 2 * distance(expected_grads, true_grads) + floor


@pytest.mark.parametrize("name", ["kl-f16", "tiny"])
def test_a_folder_saved_by_either_loads_in_the_other(name, tmp_path):
    ours, theirs = pair(name, torch.float32)
    x, _ = inputs(ours.config, torch.float32)
    expected = ours.decode(ours.encode(x).mode())

    ours.save_pretrained(tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded, info = diffusers.AutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(
        loaded.decode(loaded.encode(x).latent_dist.mode()).sample, expected, rtol=1e-5, atol=1e-5
    )

    theirs.save_pretrained(tmp_path / "theirs")
    for path in ("theirs", "ours/diffusion_pytorch_model.safetensors"):
        back = AutoencoderKL.from_pretrained(tmp_path / path)
        assert equal(back, ours)


def test_forward_is_encode_sample_decode_and_samples_as_diffusers_does():
    model, theirs = pair("tiny", torch.float32)
    x, noise = inputs(model.config, torch.float32)
    out = model(x, noise)
    torch.testing.assert_close(out.latent, out.posterior.mean + out.posterior.std * noise)
    torch.testing.assert_close(out.reconstruction, model.decode(out.latent))
    torch.testing.assert_close(model(x, sample_posterior=False).latent, out.posterior.mode())
    a = out.posterior.sample(torch.Generator().manual_seed(5))
    b = theirs.encode(x).latent_dist.sample(torch.Generator().manual_seed(5))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_cut_at_the_latent_gives_the_same_gradients_in_two_pieces():
    model = AutoencoderKL(narrow("kl-f8")).double()
    x, noise = inputs(model.config, torch.float64)
    whole = model(x, noise)
    assert whole.leaf is None
    assert whole.decoded is whole.latent
    expected = torch.autograd.grad(
        whole.reconstruction.square().mean() + whole.posterior.kl().mean(), list(model.parameters())
    )

    cut = model(x, noise, cut_latent=True)
    assert cut.leaf is cut.decoded
    cut.reconstruction.square().mean().backward()
    assert all(p.grad is None for p in model.encoder.parameters())
    torch.autograd.backward([cut.latent, cut.posterior.kl().mean()], [cut.leaf.grad, None])
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)


def test_what_is_done_to_a_latent_lies_between_the_leaf_and_the_decoder():
    model = AutoencoderKL(narrow("tiny")).double()
    x, noise = inputs(model.config, torch.float64)
    out = model(x, noise, latent_transform=lambda z: 0.5 * z + 1, cut_latent=True)
    assert torch.equal(out.decoded, 0.5 * out.latent + 1)
    torch.testing.assert_close(out.reconstruction, model.decode(out.decoded))
    out.decoded.retain_grad()
    out.reconstruction.square().mean().backward()
    assert torch.equal(out.leaf.grad, 0.5 * out.decoded.grad)
    assert not out.leaf.grad_fn


def test_there_is_nothing_to_cut_where_nothing_learns_before_the_latent():
    model = AutoencoderKL(narrow("tiny"))
    x, _ = inputs(model.config, torch.float32)
    with torch.no_grad():
        assert model(x, cut_latent=True).leaf is None
    model.encoder.requires_grad_(False)
    model.quant_conv.requires_grad_(False)
    assert model(x, cut_latent=True).leaf is None


@pytest.mark.parametrize(("name", "checkpointing"), [("kl-f16", False), ("tiny", True)])
def test_features_are_what_the_last_normalizations_read(name, checkpointing):
    model = AutoencoderKL(narrow(name)).double()
    model.gradient_checkpointing = checkpointing
    x, noise = inputs(model.config, torch.float64)
    out = model(x, noise, keep_features=True)
    silu, decoder, encoder = torch.nn.functional.silu, model.decoder, model.encoder
    assert not out.decoder_features.requires_grad
    assert not out.encoder_features.requires_grad
    torch.testing.assert_close(
        decoder.conv_out(silu(decoder.conv_norm_out(out.decoder_features))), out.reconstruction
    )
    moments = model.quant_conv(encoder.conv_out(silu(encoder.conv_norm_out(out.encoder_features))))
    torch.testing.assert_close(moments[:, : model.config.latent_channels], out.posterior.mean)
    plain = model(x, noise)
    assert plain.decoder_features is None
    assert plain.encoder_features is None


def test_wrong_inputs_and_weights_say_what_was_expected_in_one_line(tmp_path):
    model = AutoencoderKL(narrow("tiny"))
    with pytest.raises(ImageError, match=r"30 x 32.*multiples of 4"):
        model.encode(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ImageError, match=r"expected \[B, 3, H, W\]"):
        model.encode(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ModelError, match=r"expected \[B, 8, h, w\]"):
        model.decode(torch.zeros(1, 4, 8, 8))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "latent_channels": 4}))
    with pytest.raises(ModelError, match="latent_channels = 4") as caught:
        AutoencoderKL.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("what", ["missing folder", "empty folder", "no config", "bad json", "unknown key"])
def test_a_folder_that_is_no_model_is_refused(what, tmp_path):
    folder = tmp_path / "model"
    if what != "missing folder":
        folder.mkdir()
    if what not in ("missing folder", "empty folder"):
        AutoencoderKL(narrow("tiny")).save_pretrained(folder)
    config = folder / "config.json"
    if what == "no config":
        config.unlink()
    elif what == "bad json":
        config.write_text("{")
    elif what == "unknown key":
        config.write_text(json.dumps({**json.loads(config.read_text()), "flux_capacitor": 1}))
    with pytest.raises(ModelError) as caught:
        AutoencoderKL.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_saved_bytes_do_not_depend_on_the_memory_format(tmp_path):
    model = AutoencoderKL(narrow("tiny"))
    model.save_pretrained(tmp_path / "a")
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path / "b")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
