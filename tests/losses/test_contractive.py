from __future__ import annotations

import pytest
import torch
from latentae_kernels import use_backend
from torch import nn

from latentae.losses.adversarial import twice_differentiable
from latentae.losses.contractive import frobenius_exact, jacobian_energy
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import preset


def frobenius(encode, x, probes) -> torch.Tensor:
    """The estimate, as a training step computes it."""
    with twice_differentiable():
        inputs = x.detach().requires_grad_()
        with torch.enable_grad():
            return jacobian_energy(encode(inputs), inputs, probes, graph=torch.is_grad_enabled())


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.SiLU()).double()


def plain_energy(net, x) -> torch.Tensor:
    jacobians = [torch.autograd.functional.jacobian(lambda one: net(one[None])[0], image) for image in x]
    return torch.stack([j.square().sum() for j in jacobians])


def test_exact_equals_the_jacobian_and_only_measures_without_gradients():
    net, x = small_net(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    expected = plain_energy(net, x)
    torch.testing.assert_close(frobenius_exact(net, x), expected, rtol=1e-12, atol=0)
    with torch.no_grad():
        value = frobenius_exact(net, x)
    assert not value.requires_grad
    assert not x.requires_grad
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("kind", ["normal", "signs"])
def test_the_estimate_is_unbiased(kind):
    net, x = small_net(), torch.randn(2, 2, 6, 6, dtype=torch.float64)
    exact = frobenius_exact(net, x).detach()
    inputs = x.clone().requires_grad_()
    code = net(inputs)
    probes = torch.randn(400, *code.shape, dtype=torch.float64)
    probes = probes if kind == "normal" else probes.sign()
    each = torch.stack([jacobian_energy(code, inputs, v[None], graph=False) for v in probes])
    error = (each.mean(dim=0) - exact).abs()
    assert (error < 4 * each.std(dim=0) / 400**0.5).all()
    torch.testing.assert_close(frobenius(net, x, probes[:5]).detach(), each[:5].mean(dim=0))


@pytest.mark.parametrize("exact", [True, False])
def test_gradient_to_the_weights_in_fp64(exact):
    net, x = small_net(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    probes = torch.randn(2, *net(x).shape, dtype=torch.float64)
    names, parameters = zip(*net.named_parameters(), strict=True)

    def energy(*values: torch.Tensor) -> torch.Tensor:
        def encode(images):
            return torch.func.functional_call(net, dict(zip(names, values, strict=True)), (images,))

        return frobenius_exact(encode, x) if exact else frobenius(encode, x, probes)

    assert torch.autograd.gradcheck(energy, tuple(p.detach().requires_grad_() for p in parameters))


def test_the_codes_own_graph_is_kept():
    net, inputs = small_net(), torch.randn(2, 2, 4, 4, dtype=torch.float64).requires_grad_()
    code = net(inputs)
    energy = jacobian_energy(code, inputs, torch.randn(3, *code.shape, dtype=torch.float64))
    (energy.sum() + code.sum()).backward()
    assert net[0].weight.grad.abs().sum() > 0


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = preset(
        "tiny",
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=2,
        mid_block_add_attention=True,
        **blocks,
    )
    model = AutoencoderKL(config).double()
    for name, parameter in model.named_parameters():  # biases and affine parts that are zero hide mistakes
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0.0, 0.1)
    return model


@pytest.mark.parametrize(("backend", "checkpointing"), [("auto", False), ("auto", True), ("triton", False)])
def test_the_autoencoders_encoder_has_the_right_second_derivative(autoencoder, backend, checkpointing):
    """On native operators, recomputed blocks and the fused kernels alike (attention included)."""
    device = (
        "cuda" if torch.cuda.is_available() else "cpu"
    )  # where there is no GPU the kernels are interpreted
    autoencoder, f = autoencoder.to(device), autoencoder.config.downsampling
    x = torch.rand(2, 3, 2 * f, 2 * f, dtype=torch.float64, device=device) * 2 - 1
    probes = torch.randn(1, *autoencoder.encode(x).mean.shape, dtype=torch.float64, device=device)
    parameters = [*autoencoder.encoder.parameters()]
    directions = [torch.randn_like(p) for p in parameters]
    assert len(autoencoder.encoder.mid_block.attentions) == 1

    def energy() -> torch.Tensor:
        return frobenius(lambda images: autoencoder.encode(images).mean, x, probes).sum()

    def shifted(step: float) -> torch.Tensor:
        with torch.no_grad():
            torch._foreach_add_(parameters, directions, alpha=step)
            value = energy()
            torch._foreach_add_(parameters, directions, alpha=-step)
        return value

    step = 1e-5
    difference = (shifted(step) - shifted(-step)) / (2 * step)
    autoencoder.gradient_checkpointing = checkpointing
    autoencoder.train()
    with use_backend(backend), twice_differentiable():  # the backward pass recomputes attention
        gradients = torch.autograd.grad(energy(), parameters, allow_unused=True)
    autoencoder.gradient_checkpointing = False
    assert sum(g is not None for g in gradients) > len(parameters) / 2
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=0)
