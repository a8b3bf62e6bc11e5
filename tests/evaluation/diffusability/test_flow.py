"""network.py and flow.py: the fixed transformer, its training and its sampling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.evaluation.diffusability.flow import (
    DEPTH,
    HEADS,
    TOKENS,
    WIDTH,
    TinyTransformer,
    draw,
    fit_flow,
    patch_side,
)
from latentae.evaluation.diffusability.latents import Latents, Whitening

WHITE = Whitening(torch.zeros(2, 1, 1), torch.ones(2, 1, 1))


def stripes(count: int) -> Latents:
    """Latents with one constant value per image."""
    values = torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    means = tuple(values.expand(count, 2, 4, 4).clone())
    return Latents(
        tuple(map(str, range(count))),
        means,
        tuple(torch.full_like(mean, 1e-3) for mean in means),
        None,
        count,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300))
def test_the_patch_is_the_smallest_with_few_enough_tokens(height, width):
    patch = patch_side(height, width)
    assert math.ceil(height / patch) * math.ceil(width / patch) <= TOKENS
    assert patch == 1 or math.ceil(height / (patch - 1)) * math.ceil(width / (patch - 1)) > TOKENS


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_new_network_maps_each_patch_of_any_size_to_itself(channels, height, width, data):
    network = TinyTransformer((channels, height, width))
    torch.nn.init.normal_(network.write.weight)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    z = torch.randn(1, channels, height, width, requires_grad=True)
    network(z, torch.tensor([0.3]))[0, :, row, column].sum().backward()
    assert z.grad is not None
    inside = torch.zeros(height, width, dtype=torch.bool)
    top, left = (place // network.patch * network.patch for place in (row, column))
    inside[top : top + network.patch, left : left + network.patch] = True
    assert torch.equal(z.grad[0].abs().sum(0) > 0, inside)


@pytest.mark.parametrize(
    "shape", [(4, 8, 8), (16, 32, 32), (4, 64, 64), (128, 16, 16), (192, 8, 8), (32, 4, 4)]
)
def test_the_network_has_1_to_3_million_parameters_whatever_the_latent(shape):
    with torch.device("meta"):
        network = TinyTransformer(shape)
    assert 1e6 < sum(parameter.numel() for parameter in network.parameters()) < 3e6
    assert (WIDTH, DEPTH, HEADS, len(network.blocks)) == (160, 3, 5, 3)


def test_a_new_network_is_the_best_linear_guess_and_flows_from_white_noise_to_white_noise():
    network = TinyTransformer((3, 5, 6))
    generator = torch.Generator().manual_seed(1)
    data, noise = (torch.randn(10_000, generator=generator).double() for _ in range(2))
    for t in (0.0, 0.2, 0.5, 0.9, 1.0):
        mixed, velocity = (1 - t) * noise + t * data, data - noise
        slope = (mixed * velocity).mean() / mixed.square().mean()  # of the regression of v on z_t
        z = torch.randn(1, 3, 5, 6)
        torch.testing.assert_close(network(z, torch.tensor([t])), slope.float() * z, atol=0.05, rtol=0.05)
    samples = draw(network, 32, seed=0)
    assert samples.mean().abs() < 0.06
    assert samples.std().item() == pytest.approx(1, abs=0.04)


def test_every_place_and_the_time_reach_the_output():
    network = TinyTransformer((2, 3, 3))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    z = torch.randn(1, 2, 3, 3, requires_grad=True)
    network(z, torch.tensor([0.3]))[0, 0, 0, 0].backward()
    assert z.grad is not None
    assert (z.grad != 0).all()
    assert not torch.allclose(network(z, torch.tensor([0.3])), network(z, torch.tensor([0.6])))


def test_training_learns_what_places_have_in_common():
    latents = stripes(64)
    seen: list[float] = []
    fitted = fit_flow(latents, WHITE, steps=40, batch=32, seed=0, advance=seen.append)
    assert fitted.loss is not None
    assert len(seen) == 40
    assert fitted.loss == pytest.approx(sum(seen[-10:]) / 10)
    assert fitted.loss < 0.5 * seen[0]
    drawn = draw(fitted.network, 32, seed=0)
    assert drawn.std(dim=(1, 2, 3)).mean() < 0.6 < drawn.mean(dim=(1, 2, 3)).std() < 1.4
    untrained = draw(fit_flow(latents, WHITE, steps=0, batch=32, seed=0).network, 32, seed=0)
    assert untrained.std(dim=(1, 2, 3)).mean() > 0.8 > 0.3 > untrained.mean(dim=(1, 2, 3)).std()


def test_everything_is_a_function_of_the_seed_also_within_inference_mode():
    latents = stripes(8)
    with torch.inference_mode():
        first = fit_flow(latents, WHITE, steps=3, batch=4, seed=5)
    torch.randn(3)  # torch's own generator has no say
    again, other = (fit_flow(latents, WHITE, steps=3, batch=4, seed=seed) for seed in (5, 6))
    assert first.loss == again.loss != other.loss
    samples = draw(first.network, 6, seed=5)
    assert torch.equal(samples, draw(again.network, 6, seed=5))
    assert not torch.equal(samples, draw(first.network, 6, seed=6))
    torch.testing.assert_close(
        draw(first.network, 6, seed=5, batch=4), samples, rtol=1e-4, atol=1e-5
    )  # for any batch
    torch.testing.assert_close(draw(first.network, 2, seed=5, start=3), samples[3:5], rtol=1e-4, atol=1e-5)


def test_training_that_diverges_stops_and_says_so():
    latents = stripes(4)
    latents.means[0].fill_(torch.nan)
    seen: list[float] = []
    fitted = fit_flow(latents, WHITE, steps=9, batch=64, seed=0, advance=seen.append)
    assert (fitted.diverged, fitted.loss, seen) == (True, None, [])


@pytest.mark.parametrize(("std", "expected"), [(1.0, math.pi / 2), (1e-3, math.pi / 4)])
def test_training_samples_the_posterior_at_evenly_spread_times(std, expected):
    """A new network's loss is the mean over t of 1 / s^2 for white latents, t^2 / s^4 for zeros."""
    means = tuple(torch.zeros(4, 2, 16, 16))
    latents = Latents(tuple("abcd"), means, tuple(torch.full_like(mean, std) for mean in means), None, 4)
    loss = fit_flow(latents, WHITE, steps=1, batch=64, seed=0).loss
    assert loss == pytest.approx(
        expected, rel=0.02
    )  # four standard errors of the draws; times at random would have 8 %
