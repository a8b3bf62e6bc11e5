from __future__ import annotations

import numpy as np
import pytest
import torch
from latentae_kernels import use_backend
from torch import nn
from torch.distributions import Normal, kl_divergence

from latentae.errors import RecipeError
from latentae.losses.adversarial import twice_differentiable
from latentae.losses.latent import (
    active_fraction,
    frobenius_exact,
    jacobian_energy,
    kl_free_bits,
    kl_per_element,
    kl_sparsity,
    l1_sparsity,
    mean_activation,
)
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import DiagonalGaussian
from latentae.models.presets import preset


def plain_kl(posterior: DiagonalGaussian) -> torch.Tensor:
    return kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0))


def test_kl_is_the_closed_form_over_image_elements():
    posterior, images = (
        DiagonalGaussian(torch.randn(3, 8, 2, 5, dtype=torch.float64)),
        torch.zeros(3, 3, 16, 40),
    )
    expected = plain_kl(posterior).sum(dim=(1, 2, 3)) / (3 * 16 * 40)
    torch.testing.assert_close(kl_per_element(posterior, images), expected, rtol=1e-12, atol=0)


def test_the_ratio_to_the_pixel_loss_does_not_depend_on_the_resolution():
    small = torch.randn(2, 8, 4, 4)
    posteriors = [
        (DiagonalGaussian(small.repeat(1, 1, k, k)), torch.zeros(2, 3, 32 * k, 32 * k)) for k in (1, 2)
    ]
    torch.testing.assert_close(*(kl_per_element(*each) for each in posteriors))
    torch.testing.assert_close(*(kl_free_bits(*each, free_bits=1.0) for each in posteriors))


def test_a_standard_normal_posterior_costs_nothing_and_logvar_is_clamped():
    assert DiagonalGaussian(torch.zeros(2, 8, 3, 3)).kl().abs().max() == 0
    wild = DiagonalGaussian(torch.full((1, 2, 1, 1), 1000.0))
    assert wild.logvar.item() == 20
    assert DiagonalGaussian(torch.full((1, 2, 1, 1), -1000.0)).logvar.item() == -30


def test_free_bits_are_a_floor_for_each_channel_of_the_batch_average():
    posterior, images = (
        DiagonalGaussian(torch.randn(5, 8, 3, 2, dtype=torch.float64)),
        torch.zeros(5, 3, 24, 16),
    )
    kl = plain_kl(posterior).sum(dim=(2, 3)).mean(dim=0)
    floor = kl.sort().values[1:3].mean().item()  # two channels below, two above
    expected = np.maximum(kl.numpy(), floor).sum() / (3 * 24 * 16)
    torch.testing.assert_close(
        kl_free_bits(posterior, images, floor / 6).item(), expected, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(kl_free_bits(posterior, images, 0.0), kl_per_element(posterior, images).mean())


def test_channels_below_the_floor_are_left_alone():
    moments = torch.randn(4, 4, 3, 3)
    moments[:, 1] *= 10  # the mean of channel 1 is far out
    moments.requires_grad_()
    kl_free_bits(DiagonalGaussian(moments), torch.zeros(4, 3, 24, 24), free_bits=60.0 / 9).backward()
    assert not moments.grad[:, [0, 2]].any()
    assert moments.grad[:, [1, 3]].any()


def test_free_bits_of_two_ranks_are_those_of_the_global_batch():
    moments = torch.randn(6, 4, 3, 3, dtype=torch.float64)
    moments[3:] *= 3
    scale = torch.ones(1, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    images = torch.zeros(6, 3, 24, 24)

    halves = [plain_kl(DiagonalGaussian(part)).sum(dim=(2, 3)).mean(dim=0) for part in moments.chunk(2)]
    floor = torch.stack(halves).mean(dim=0).mean().item()
    whole = kl_free_bits(DiagonalGaussian(moments * scale), images, floor / 9)
    parts = [
        kl_free_bits(
            DiagonalGaussian(part * scale), images[:3], floor / 9, lambda own: torch.stack(halves).mean(dim=0)
        )
        for part in moments.chunk(2)
    ]
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=0)
    (expected,) = torch.autograd.grad(whole, scale)
    found = [torch.autograd.grad(part, scale)[0] for part in parts]
    torch.testing.assert_close((found[0] + found[1]) / 2, expected, rtol=1e-12, atol=1e-15)


def test_l1_is_the_mean_magnitude_of_each_latent_and_activation_the_mean_of_each_channel():
    z = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    np.testing.assert_allclose(
        l1_sparsity(z).numpy(), np.abs(z.numpy()).reshape(3, -1).mean(axis=1), rtol=1e-12
    )
    np.testing.assert_allclose(
        mean_activation(z).numpy(), (1 / (1 + np.exp(-z.numpy()))).mean(axis=(0, 2, 3)), rtol=1e-12
    )


def test_kl_sparsity_equals_the_bernoulli_divergence_vanishes_at_the_target_and_stays_finite():
    found = torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Bernoulli(torch.tensor(0.05, dtype=torch.float64)),
        torch.distributions.Bernoulli(found),
    )
    torch.testing.assert_close(kl_sparsity(found, 0.05), expected.sum())
    assert kl_sparsity(found[:1], 0.05).abs() < 1e-12
    z = torch.tensor([200.0, -200.0]).view(1, 2, 1, 1).requires_grad_()
    value = kl_sparsity(mean_activation(z), 0.05)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("rho", [0.0, 1.0, -0.1, 3.0])
def test_a_target_that_is_no_share_is_refused(rho):
    with pytest.raises(RecipeError, match=f"rho is {rho:g}, expected a number between 0 and 1"):
        kl_sparsity(torch.tensor([0.5]), rho)


def test_averaged_sparsity_gradients_of_two_ranks_are_those_of_the_global_batch():
    net = nn.Conv2d(3, 4, 3, stride=2).double()
    images = torch.randn(6, 3, 9, 9, dtype=torch.float64)
    images[3:] *= 4  # ranks differ
    parameters = list(net.parameters())

    whole = mean_activation(net(images))
    expected = torch.autograd.grad(kl_sparsity(whole, 0.05), parameters)
    gathered = [mean_activation(net(part)).detach() for part in images.chunk(2)]

    def reduce(own: torch.Tensor) -> torch.Tensor:
        assert not own.requires_grad
        assert any(torch.equal(own, mine) for mine in gathered)
        return torch.stack(gathered).mean(dim=0)

    def averaged(reduction) -> list[torch.Tensor]:
        parts = [mean_activation(net(part), reduction) for part in images.chunk(2)]
        if reduction is not None:
            assert torch.equal(parts[0], parts[1])
            torch.testing.assert_close(parts[0], whole, rtol=1e-12, atol=0)
        found = [torch.autograd.grad(kl_sparsity(part, 0.05), parameters) for part in parts]
        return [torch.stack(pair).mean(dim=0) for pair in zip(*found, strict=True)]

    for ours, theirs in zip(averaged(reduce), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(averaged(None), expected, strict=True))


def test_active_fraction_counts_elements_beyond_the_threshold():
    z = torch.tensor([[0.0, 0.2, -0.3, 1.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 4, 1, 1)
    assert active_fraction(z, 0.1).tolist() == [0.75, 0.0]
    assert active_fraction(z.bfloat16().sigmoid(), 0.45).tolist() == [0.75, 1.0]


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
