from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from latentae.errors import RecipeError
from latentae.losses.sparsity import active_fraction, kl_sparsity, l1, mean_activation


def test_l1_is_the_mean_magnitude_of_each_latent_and_activation_the_mean_of_each_channel():
    z = torch.randn(3, 4, 2, 5, dtype=torch.float64)
    np.testing.assert_allclose(l1(z).numpy(), np.abs(z.numpy()).reshape(3, -1).mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        mean_activation(z).numpy(), (1 / (1 + np.exp(-z.numpy()))).mean(axis=(0, 2, 3)), rtol=1e-12
    )


def test_kl_equals_the_bernoulli_divergence_vanishes_at_the_target_and_stays_finite():
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


def test_averaged_gradients_of_two_ranks_are_those_of_the_whole_batch():
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
