from __future__ import annotations

import pytest
import torch
from latentae_kernels import use_backend
from small_models import randomize_norms, two_levels

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.initialization import set_initial_logvar
from latentae.models.last_layer import decoder_weight_gradient, encoder_weight_gradient


def model(quant: bool = True) -> AutoencoderKL:
    return randomize_norms(two_levels(use_quant_conv=quant, use_post_quant_conv=quant))


def gradients(autoencoder: AutoencoderKL, x: torch.Tensor, noise: torch.Tensor | None):
    """Both gradients from the graph, and from the features; the gradients that arrive are drawn."""
    out = autoencoder(x, noise, sample_posterior=noise is not None, keep_features=True)
    at_image, at_latent = torch.randn_like(out.reconstruction), torch.randn_like(out.latent)
    weights = autoencoder.decoder.conv_out.weight, autoencoder.encoder.conv_out.weight
    graph = (
        torch.autograd.grad(out.reconstruction, weights[0], at_image, retain_graph=True)[0],
        torch.autograd.grad(out.latent, weights[1], at_latent)[0],
    )
    found = (
        decoder_weight_gradient(autoencoder, out.decoder_features, at_image),
        encoder_weight_gradient(autoencoder, out.encoder_features, noise, at_latent),
    )
    return graph, found


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("quant", "sampled"), [(True, True), (False, True), (True, False)])
def test_fp64_gradients_are_those_of_the_graph(backend, quant, sampled):
    autoencoder, x = model(quant), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    noise = torch.randn(2, 4, 4, 6, dtype=torch.float64) if sampled else None
    with use_backend(backend):
        for expected, found in zip(*gradients(autoencoder, x, noise), strict=True):
            assert found.dtype == torch.float64
            assert not found.requires_grad
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_log_variance_outside_the_clamp_passes_no_gradient():
    autoencoder, x = model(), torch.randn(2, 3, 8, 12, dtype=torch.float64)
    set_initial_logvar(autoencoder, 20.0)  # about half of the values
    assert 0.2 < (autoencoder.encode(x).logvar == 20).double().mean() < 0.8
    noise = torch.randn(2, 4, 4, 6, dtype=torch.float64)
    for expected, found in zip(*gradients(autoencoder, x, noise), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bf16_features_give_fp32_gradients(backend):
    autoencoder, x, noise = model().float(), torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        graph, found = gradients(autoencoder, x, noise)
    for expected, gradient in zip(graph, found, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_fp32_accumulation_is_nearer_to_fp64_than_the_bf16_graph():
    autoencoder, x = model().float(), torch.randn(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = autoencoder(x, sample_posterior=False, keep_features=True)
    gradient = torch.randn_like(out.reconstruction).bfloat16()
    graph = torch.autograd.grad(out.reconstruction, autoencoder.decoder.conv_out.weight, gradient)[0]
    found = decoder_weight_gradient(autoencoder, out.decoder_features, gradient)
    exact = decoder_weight_gradient(autoencoder.double(), out.decoder_features.double(), gradient.double())
    assert (found - exact).norm() < (graph - exact).norm()


def test_stacked_gradients_share_the_work():
    autoencoder, x = model(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    features = autoencoder(x, keep_features=True).decoder_features
    parts = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    stacked = decoder_weight_gradient(autoencoder, features, torch.cat(parts, dim=1))
    for part, found in zip(parts, stacked.chunk(2), strict=True):
        torch.testing.assert_close(found, decoder_weight_gradient(autoencoder, features, part))
