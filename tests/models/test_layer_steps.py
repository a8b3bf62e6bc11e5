from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend
from small_models import kept_bytes, two_levels

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.layer_steps import Pending


@pytest.mark.parametrize("name", ["kl-f8", "tiny"])
def test_the_fused_model_is_the_plain_model(name):
    autoencoder, x = AutoencoderKL(two_levels(name)).double(), torch.randn(1, 3, 8, 12, dtype=torch.float64)
    before, noise = x.clone(), torch.randn(1, autoencoder.config.latent_channels, 4, 6, dtype=torch.float64)
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            output = autoencoder(x, noise=noise)
            loss = output.reconstruction.square().mean() + output.posterior.kl().mean()
            gradients = torch.autograd.grad(loss, list(autoencoder.parameters()))
            with torch.no_grad():
                results.append(
                    [output.reconstruction, autoencoder(x, noise=noise).reconstruction, *gradients]
                )
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)
    for with_graph, without in (result[:2] for result in results):
        torch.testing.assert_close(without, with_graph, rtol=1e-9, atol=1e-11)
    assert torch.equal(x, before), "no input is changed in place"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradient_checkpointing_changes_no_result_and_keeps_less(backend):
    autoencoder, x = AutoencoderKL(two_levels()).double(), torch.randn(1, 3, 8, 12, dtype=torch.float64)
    parameters, results, kept = list(autoencoder.parameters()), [], []
    with use_backend(backend):
        for autoencoder.gradient_checkpointing in (False, True):
            kept.append(kept_bytes(autoencoder, lambda: autoencoder(x, sample_posterior=False)))
            output = autoencoder(x, sample_posterior=False, keep_features=True)
            gradients = torch.autograd.grad(output.reconstruction.square().mean(), parameters)
            results.append(
                [output.reconstruction, output.decoder_features, output.encoder_features, *gradients]
            )
    for remembered, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, remembered, rtol=1e-11, atol=1e-13)
    assert kept[1] < (0.4 if backend == "torch" else 0.6) * kept[0], kept


def test_gradient_checkpointing_recomputes_under_the_same_autocast():
    autoencoder, x = AutoencoderKL(two_levels()), torch.randn(1, 3, 8, 8)
    parameters, results = list(autoencoder.parameters()), []
    for autoencoder.gradient_checkpointing in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = autoencoder(x, sample_posterior=False).reconstruction.float().square().mean()
        results.append(torch.autograd.grad(loss, parameters))
    for remembered, recomputed in zip(
        *results, strict=True
    ):  # in fp32 instead, they would differ by percents
        torch.testing.assert_close(
            recomputed, remembered, rtol=1e-4, atol=1e-4 * remembered.abs().max().item()
        )


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # torch.compile hides its own, but not from pytest
@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        ("torch", False),
        pytest.param("torch", True, marks=pytest.mark.slow),
        pytest.param("triton", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_coders_are_one_graph_each_and_can_be_differentiated_in_two_pieces(backend, checkpointing):
    plain, x = AutoencoderKL(two_levels()).double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    noise = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    plain.gradient_checkpointing = checkpointing
    compiled = copy.deepcopy(plain)
    torch._dynamo.reset()
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
    torch._dynamo.reset()
    torch.testing.assert_close(compiled.features, plain.features)
    assert not any(features.requires_grad for features in compiled.features)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


def test_pending_adds_up():
    x, residual, bias = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(3)
    assert Pending(x).value() is x
    torch.testing.assert_close(Pending(x, bias, residual).value(), x + bias.view(1, 3, 1, 1) + residual)
