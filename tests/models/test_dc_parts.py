"""What training asks of an AutoencoderDC: parts that learn, gradients at last layers, and where weights start."""

from __future__ import annotations

import pytest
import torch
from latentae_kernels import use_backend
from small_models import DC

from latentae.errors import ModelError
from latentae.models.config import AutoencoderDCConfig, LinearAutoencoderConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.initialization import set_deterministic, set_initial_logvar, start_linear
from latentae.models.last_layer import decoder_weight_gradient, encoder_weight_gradient
from latentae.models.linear import LinearAutoencoder
from latentae.models.trainable import select_trainable

EMPTY = {"encoder_layers_per_block": (0, 1, 0), "decoder_layers_per_block": (0, 1, 0)}
LAST = {
    "convolution": {},
    "shuffle": {"decoder_layers_per_block": (0, 1, 1)},
    "interpolation": {"decoder_layers_per_block": (0, 1, 1), "upsample_block_type": "interpolate", "decoder_conv_act_fn": "silu"},
}
PARTS = {
    "all": ("",),
    "decoder": ("decoder.",),
    "decoder-head": ("decoder.up_blocks.{fine}.", "decoder.norm_out.", "decoder.conv_out."),
    "encoder": ("encoder.",),
    "latent": (
        "encoder.down_blocks.{coarse}.", "encoder.conv_out.", "encoder.conv_out_logvar.",
        "decoder.conv_in.", "decoder.up_blocks.{coarse}.",
    ),
}  # fmt: skip


def build(**changes) -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(AutoencoderDCConfig(**{**DC, **changes}))


def images(model: AutoencoderDC, side: int = 3) -> torch.Tensor:
    return torch.rand(2, 3, side * model.config.downsampling, side * model.config.downsampling) * 2 - 1


@pytest.mark.parametrize(
    ("changes", "fine", "coarse"), [({}, 0, 2), ({"bottleneck": "gaussian"}, 0, 2), ({**EMPTY, "bottleneck": "gaussian"}, 1, 1)]
)
@pytest.mark.parametrize("part", PARTS)
def test_each_parameter_of_a_part_learns_and_no_other(part, changes, fine, coarse):
    model = build(**changes)
    select_trainable(model, part)
    inside = tuple(prefix.format(fine=fine, coarse=coarse) for prefix in PARTS[part])
    expected = {key for key, _ in model.named_parameters() if key.startswith(inside)}
    assert {key for key, p in model.named_parameters() if p.requires_grad} == expected
    model(images(model)).reconstruction.square().mean().backward()
    assert {key for key, p in model.named_parameters() if p.grad is not None} == expected


@pytest.mark.parametrize("part", PARTS)
def test_gradients_of_a_part_are_those_of_the_whole(part):
    model = build(bottleneck="gaussian").double()
    x, noise = images(model).double(), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    expected = torch.autograd.grad(model(x, noise).reconstruction.square().mean(), list(model.parameters()))
    select_trainable(model, part)
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(x, noise).reconstruction.square().mean().backward()
        for p, gradient in zip(model.parameters(), expected, strict=True):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-13)


def test_a_frozen_encoder_gives_the_latent_of_inference():
    model = build()
    x = images(model)
    with torch.no_grad():
        expected = model.encode(x).mode()
    select_trainable(model, "decoder-head")
    latent = model(x, sample_posterior=False).latent
    torch.testing.assert_close(latent, expected)
    assert not latent.requires_grad


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("last", "bottleneck"), [("convolution", "deterministic"), ("shuffle", "gaussian"), ("interpolation", "gaussian")]
)
def test_gradients_at_the_last_layers_are_those_of_the_graph(last, bottleneck, backend):
    model = build(**LAST[last], bottleneck=bottleneck).double()
    torch.nn.init.normal_(model.decoder.norm_out.weight)
    torch.nn.init.normal_(model.decoder.norm_out.bias)
    x, noise = images(model, 2).double(), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    with use_backend(backend):
        out = model(x, noise, sample_posterior=bottleneck == "gaussian", keep_features=True)
        at_image, at_latent = torch.randn(2, *out.reconstruction.shape, dtype=torch.float64), torch.randn_like(out.latent)
        conv = getattr(model.decoder.conv_out, "conv", model.decoder.conv_out)
        expected = [torch.autograd.grad(out.reconstruction, conv.weight, g, retain_graph=True)[0] for g in at_image]
        (encoder,) = torch.autograd.grad(out.latent, model.encoder.conv_out.weight, at_latent)
        found = decoder_weight_gradient(model, out.decoder_features, torch.cat(tuple(at_image), dim=1))
        torch.testing.assert_close(found, torch.cat(expected), rtol=1e-10, atol=1e-12)
        found = encoder_weight_gradient(model, out.encoder_features, noise, at_latent)
        torch.testing.assert_close(found, encoder, rtol=1e-10, atol=1e-12)
    assert not found.requires_grad


def test_bf16_features_give_fp32_gradients():
    model = build()
    x = images(model)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, keep_features=True)
        found = decoder_weight_gradient(model, out.decoder_features, torch.ones_like(out.reconstruction))
        assert encoder_weight_gradient(model, out.encoder_features, None, torch.ones_like(out.latent)).dtype == torch.float32
    assert found.dtype == torch.float32
    exact = model(x, keep_features=True)
    truth = decoder_weight_gradient(model, exact.decoder_features, torch.ones_like(exact.reconstruction))
    assert (found - truth).norm() < 0.05 * truth.norm()


def test_a_model_without_such_a_layer_says_so():
    linear, x = LinearAutoencoder(LinearAutoencoderConfig()), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ModelError, match="a LinearAutoencoder has no last layer to weigh losses at"):
        decoder_weight_gradient(linear, x, x)
    with pytest.raises(ModelError, match="set adaptive = false"):
        encoder_weight_gradient(linear, x, None, x)
    with pytest.raises(ModelError, match="no linear start of its own"):
        start_linear(linear)


@pytest.mark.parametrize("norm", ["rms_norm", "batch_norm"])
def test_a_linear_start_is_linear_up_to_the_latent_and_keeps_the_variance(norm):
    model = build(bottleneck="gaussian", decoder_norm_types=norm, encoder_layers_per_block=(2, 2, 2)).double().eval()
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
    assert all(
        p.grad.abs().max() > 0 for name, p in model.named_parameters() if name.endswith(("norm.weight", "attn.norm_out.weight"))
    )


def test_the_spread_at_the_start_can_be_set_where_there_is_a_posterior():
    model = build(bottleneck="gaussian")
    x = images(model)
    set_initial_logvar(model, -6.0)
    torch.testing.assert_close(model.encode(x).logvar, torch.full((2, 4, 3, 3), -6.0))
    torch.nn.init.normal_(model.encoder.conv_out_logvar.weight)
    set_deterministic(model)
    assert (model.encode(x).logvar == -30).all()
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_deterministic(model)
    set_initial_logvar(model, 0.0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    with pytest.raises(ModelError, match="without a posterior has no log-variance to begin at -6"):
        set_initial_logvar(model, -6.0)
