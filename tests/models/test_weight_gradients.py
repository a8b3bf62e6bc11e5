from __future__ import annotations

import pytest
import torch
from latentae_kernels import use_backend
from small_models import dc_config, images_of, randomize_norms, two_levels

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.initialization import set_initial_logvar
from latentae.models.linear import LinearAutoencoder

MODELS = {
    "kl": two_levels(),
    "kl without 1x1": two_levels(use_quant_conv=False, use_post_quant_conv=False),
    "dc": dc_config(),
    "dc, shuffle": dc_config(bottleneck="gaussian", decoder_layers_per_block=(0, 1, 1)),
    "dc, interpolation": dc_config(
        bottleneck="gaussian",
        decoder_layers_per_block=(0, 1, 1),
        upsample_block_type="interpolate",
        decoder_conv_act_fn="silu",
    ),
}


def build(name: str) -> AutoencoderKL | AutoencoderDC:
    """In fp64, with normalizations that are not the identity."""
    model = randomize_norms(
        (AutoencoderDC if name.startswith("dc") else AutoencoderKL)(MODELS[name]).double()
    )
    if name.startswith("dc"):
        torch.nn.init.normal_(model.decoder.norm_out.weight)
        torch.nn.init.normal_(model.decoder.norm_out.bias)
    return model


def gradients(
    model: AutoencoderKL | AutoencoderDC, x: torch.Tensor, noise: torch.Tensor, sampled: bool = True
):
    """Both gradients from the graph and from the features, for random gradients."""
    out = model(x, noise, sample_posterior=sampled, keep_features=True)
    at_image, at_latent = (
        torch.randn_like(torch.stack([out.reconstruction] * 2)),
        torch.randn_like(out.latent),
    )
    conv = getattr(model.decoder.conv_out, "conv", model.decoder.conv_out)
    decoder = [
        torch.autograd.grad(out.reconstruction, conv.weight, g, retain_graph=True)[0] for g in at_image
    ]
    (encoder,) = torch.autograd.grad(out.latent, model.encoder.conv_out.weight, at_latent)
    found = (
        model.decoder_weight_gradient(out.decoder_features, torch.cat(tuple(at_image), dim=1)),
        model.encoder_weight_gradient(out.encoder_features, noise if sampled else None, at_latent),
    )
    return (torch.cat(decoder), encoder), found


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("name", "sampled"), [("kl", False), *((name, name != "dc") for name in MODELS)])
def test_fp64_gradients_are_those_of_the_graph(backend, name, sampled):
    model = build(name)
    x, noise = images_of(model).double(), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    with use_backend(backend):
        for expected, found in zip(*gradients(model, x, noise, sampled), strict=True):
            assert found.dtype == torch.float64
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_log_variance_outside_the_clamp_passes_no_gradient():
    model, x = build("kl"), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    set_initial_logvar(model, 20.0)  # about half of the values
    assert 0.2 < (model.encode(x).logvar == 20).double().mean() < 0.8
    for expected, found in zip(
        *gradients(model, x, torch.randn(2, 4, 4, 6, dtype=torch.float64)), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize(("name", "backend"), [("kl", "torch"), ("kl", "triton"), ("dc", "torch")])
def test_bf16_features_give_fp32_gradients(name, backend):
    model = build(name).float()
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        graph, found = gradients(model, images_of(model, 8), torch.randn(2, 4, 8, 8), sampled=name == "kl")
    for expected, gradient in zip(graph, found, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_fp32_accumulation_is_nearer_to_fp64_than_the_bf16_graph():
    model, x = build("kl").float(), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, sample_posterior=False, keep_features=True)
    gradient = torch.randn_like(out.reconstruction).bfloat16()
    graph = torch.autograd.grad(out.reconstruction, model.decoder.conv_out.weight, gradient)[0]
    found = model.decoder_weight_gradient(out.decoder_features, gradient)
    exact = model.double().decoder_weight_gradient(out.decoder_features.double(), gradient.double())
    assert (found - exact).norm() < (graph - exact).norm()


def test_a_model_without_such_a_layer_says_so():
    linear, x = LinearAutoencoder(LinearAutoencoderConfig()), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ModelError, match="a LinearAutoencoder has no last layer to weigh losses at"):
        linear.decoder_weight_gradient(x, x)
    with pytest.raises(ModelError, match="set adaptive = false"):
        linear.encoder_weight_gradient(x, None, x)
