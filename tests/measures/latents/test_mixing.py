from __future__ import annotations

import pytest
import torch

from latentae.measures.latents.mixing import mix_latents


@pytest.mark.parametrize("center", [0.25, torch.linspace(-2, 2, 4, dtype=torch.float64).view(4, 1, 1)])
def test_spherical_keeps_the_length_and_linear_the_line(center):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)
    b = b * a.norm() / b.norm()
    for share in (0.0, 0.2, 0.5, 1.0):
        on_arc = mix_latents(a + center, b + center, share, "spherical", center) - center
        assert float(on_arc.norm()) == pytest.approx(float(a.norm()))
        angle = torch.acos((a * b).sum() / a.norm() ** 2)
        assert float(torch.acos(((on_arc * a).sum() / a.norm() ** 2).clamp(max=1))) == pytest.approx(
            float(share * angle), abs=1e-6
        )
        torch.testing.assert_close(mix_latents(a, b, share, "linear"), a + share * (b - a))
    torch.testing.assert_close(mix_latents(a, 3 * a, 0.5, "spherical"), 2 * a)


@pytest.mark.parametrize("mode", ["linear", "spherical"])
def test_the_ends_are_the_latents_themselves(mode):
    a, b = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(mix_latents(a, b, 0.0, mode, 0.5), a)
    torch.testing.assert_close(mix_latents(a, b, 1.0, mode, 0.5), b)
    assert mix_latents(a, b, 0.3, mode).dtype == torch.float32
    zero = torch.zeros(3, 4, 4)
    assert torch.equal(mix_latents(zero, zero, 0.5, mode), zero)
