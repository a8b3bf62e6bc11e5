from __future__ import annotations

import pytest
import torch

from latentae.evaluation.latent_report import LatentReport
from latentae.models.posterior import DiagonalGaussian


def test_statistics_are_those_of_samples():
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([3.0, -1.0, 0.5]).view(1, 3, 1, 1) + torch.randn(40, 3, 16, 16, generator=generator)
    logvar = torch.tensor([0.0, -2.0, 1.0]).view(1, 3, 1, 1).expand_as(mean)
    posterior = DiagonalGaussian(torch.cat([mean, logvar], 1))
    statistics = LatentReport()
    for start in range(0, 40, 7):
        statistics.add(DiagonalGaussian(torch.cat([mean, logvar], 1)[start : start + 7]))
    result = statistics.result()
    sample = posterior.sample(generator).double()
    assert result["channel_mean"] == pytest.approx(sample.mean((0, 2, 3)).tolist(), abs=0.05)
    assert result["channel_std"] == pytest.approx(sample.std((0, 2, 3)).tolist(), rel=0.02)
    assert result["scaling_factor"] == pytest.approx(1 / sample.std().item(), rel=0.02)
    assert result["shift_factor"] == pytest.approx(sample.mean().item(), abs=0.05)
    assert result["channel_posterior_std"] == pytest.approx(torch.tensor([0.0, -1.0, 0.5]).exp().tolist(), rel=1e-6)
    assert result["kl_nats_per_image"] == pytest.approx(posterior.kl().mean().item(), rel=1e-5)


def test_a_constant_latent_has_no_scaling():
    statistics = LatentReport()
    statistics.add(DiagonalGaussian(torch.cat([torch.zeros(2, 1, 4, 4), torch.full((2, 1, 4, 4), -30.0)], 1)))
    result = statistics.result()
    assert result["std"] < 1e-6
