from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import preset
from latentae.models.pending import Pending

SMALL = {"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1}
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def model(name: str) -> AutoencoderKL:
    """An f2 model small enough for the interpreter; every kind of layer is in it."""
    return AutoencoderKL(preset(name, **SMALL, **LEVELS)).double()


@pytest.mark.parametrize("name", ["kl-f8", "tiny"])
def test_the_fused_model_is_the_plain_model(name):
    autoencoder, x, noise = model(name), torch.randn(2, 3, 8, 12, dtype=torch.float64), None
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            noise = torch.randn(2, autoencoder.config.latent_channels, 4, 6, dtype=torch.float64) if noise is None else noise
            output = autoencoder(x, noise=noise)
            loss = output.reconstruction.square().mean() + output.posterior.kl().mean()
            results.append([output.reconstruction, *torch.autograd.grad(loss, list(autoencoder.parameters()))])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


def test_no_gradient_mode_gives_the_same_numbers_and_touches_no_input():
    autoencoder, x = model("kl-f8"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    before = x.clone()
    expected = autoencoder(x, sample_posterior=False).reconstruction
    for backend in ("torch", "triton"):
        with torch.no_grad(), use_backend(backend):
            found = autoencoder(x, sample_posterior=False).reconstruction
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert torch.equal(x, before)


def test_every_parameter_gets_the_same_gradient_under_checkpointing():
    from torch.utils.checkpoint import checkpoint

    autoencoder, x = model("kl-f8"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    again = copy.deepcopy(autoencoder)
    for level in [*again.encoder.down_blocks, *again.decoder.up_blocks]:
        forward = level.forward
        level.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    with use_backend("triton"):
        for one in (autoencoder, again):
            one(x, sample_posterior=False).reconstruction.square().mean().backward()
    for p, q in zip(autoencoder.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_the_model_compiles_as_one_graph():
    autoencoder, x = model("tiny"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with use_backend("triton"):
        expected = autoencoder(x, sample_posterior=False).reconstruction
        compiled = torch.compile(
            lambda x: autoencoder(x, sample_posterior=False).reconstruction, fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), expected)


def test_pending_adds_up():
    x, residual, bias = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3)
    assert Pending(x).value() is x
    torch.testing.assert_close(Pending(x, bias, residual).value(), x + bias.view(1, 3, 1, 1) + residual)
