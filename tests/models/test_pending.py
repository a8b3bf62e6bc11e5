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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_checkpointing_changes_no_bit(backend):
    autoencoder, x = model("kl-f8"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    parameters, results = list(autoencoder.parameters()), []
    with use_backend(backend):
        for autoencoder.gradient_checkpointing in (False, True):
            output = autoencoder(x, sample_posterior=False, keep_features=True)
            gradients = torch.autograd.grad(output.reconstruction.square().mean(), parameters)
            results.append([output.reconstruction, output.decoder_features, output.encoder_features, *gradients])
    for remembered, recomputed in zip(*results, strict=True):
        if backend == "torch":
            assert torch.equal(recomputed, remembered)
        else:  # there additions are left to the kernels, or made before
            torch.testing.assert_close(recomputed, remembered, rtol=1e-11, atol=1e-13)


def test_gradient_checkpointing_recomputes_under_the_same_autocast():
    autoencoder, x = model("kl-f8").float(), torch.randn(1, 3, 8, 8)
    parameters, results = list(autoencoder.parameters()), []
    for autoencoder.gradient_checkpointing in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = autoencoder(x, sample_posterior=False).reconstruction.float().square().mean()
        results.append(torch.autograd.grad(loss, parameters))
    assert all(torch.equal(recomputed, remembered) for remembered, recomputed in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_checkpointing_keeps_less(backend):
    autoencoder, kept = model("kl-f8"), []
    own = {p.untyped_storage().data_ptr() for p in autoencoder.parameters()}
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with use_backend(backend):
        for autoencoder.gradient_checkpointing in (False, True):
            storages = {}

            def remember(t, storages=storages):
                storages[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
                loss = autoencoder(x, sample_posterior=False).reconstruction.square().mean()
            kept.append(sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in own))
            del loss
    assert kept[1] < (0.35 if backend == "torch" else 0.6) * kept[0], kept


def test_the_model_compiles_as_one_graph():
    autoencoder, x = model("tiny"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    with use_backend("triton"):
        expected = autoencoder(x, sample_posterior=False).reconstruction
        compiled = torch.compile(
            lambda x: autoencoder(x, sample_posterior=False).reconstruction, fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), expected)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch.compile hides its own, but not from pytest
@pytest.mark.parametrize(("backend", "checkpointing"), [("torch", False), ("torch", True), ("triton", True)])
def test_compiled_coders_can_be_differentiated_in_two_pieces(backend, checkpointing):
    plain, x = model("kl-f8"), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    noise = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    plain.gradient_checkpointing = checkpointing
    compiled = copy.deepcopy(plain)
    compiled.compile_coders(backend="aot_eager", fullgraph=True)  # fullgraph: a graph break is an error
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    with use_backend(backend):
        for autoencoder in (plain, compiled):
            output = autoencoder(x, noise, cut_latent=True, keep_features=True)
            output.reconstruction.square().mean().backward()
            torch.autograd.backward([output.latent, output.posterior.kl().mean()], [output.leaf.grad, None])
            autoencoder.features = output.decoder_features, output.encoder_features
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, noise).reconstruction, plain(x, noise).reconstruction)
    torch.testing.assert_close(compiled.features, plain.features)
    assert not any(features.requires_grad for features in compiled.features)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_pending_adds_up():
    x, residual, bias = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3)
    assert Pending(x).value() is x
    torch.testing.assert_close(Pending(x, bias, residual).value(), x + bias.view(1, 3, 1, 1) + residual)
