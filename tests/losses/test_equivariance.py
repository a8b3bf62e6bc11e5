from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from latentae.errors import ImageError
from latentae.losses.equivariance import EQ_SCALES, Transform, downscale, draw_transform


@pytest.mark.parametrize(("f", "size"), [(4, (16, 16)), (8, (5, 7)), (32, (1, 2))])
def test_image_and_latent_agree_in_size_at_every_scale(f, size):
    z, x = torch.randn(1, 2, *size), torch.randn(1, 1, f * size[0], f * size[1])
    for scale in EQ_SCALES:
        for turns in range(4):
            t = Transform(scale, turns)
            h, w = t.latent(z).shape[-2:]
            assert t.image(x, f).shape[-2:] == (f * h, f * w)
            assert min(h, w) >= 1


def test_a_linear_decoder_without_borders_commutes_with_the_transform():
    z = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    image = F.interpolate(z, scale_factor=4, mode="nearest")
    t = Transform(0.5, 1)
    decoded = F.interpolate(t.latent(z), scale_factor=4, mode="nearest")
    torch.testing.assert_close(decoded.mean((2, 3)), t.image(image, 4).mean((2, 3)), rtol=0, atol=0.1)
    for turns in range(4):  # rotations commute exactly
        t = Transform(1.0, turns)
        assert torch.equal(F.interpolate(t.latent(z), scale_factor=4, mode="nearest"), t.image(image, 4))


def test_quarter_turns_turn_counter_clockwise_after_scaling():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert Transform(1.0, 1).latent(x).flatten().tolist() == [2, 4, 1, 3]
    assert torch.equal(Transform(1.0, 0).latent(x), x)
    assert Transform(0.5, 3).latent(torch.zeros(1, 1, 4, 8)).shape == (1, 1, 4, 2)


def test_scaling_is_antialiased_and_passes_gradients_in_half_precision():
    stripes = torch.tensor([1.0, -1.0]).repeat(16).expand(1, 1, 32, 32)
    assert (
        Transform(0.25, 0).latent(stripes)[..., 1:-1].abs().max() < 0.1
    )  # plain interpolation would keep a pattern
    z = torch.randn(1, 2, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    out = Transform(0.5, 2).latent(z)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert torch.isfinite(z.grad).all()
    assert z.grad.abs().sum() > 0


def test_draws_are_uniform_over_scales_and_turns():
    grid = [(i / 60, j / 60) for i in range(60) for j in range(60)]
    drawn = [draw_transform(pair, (0.25, 0.5, 1.0)) for pair in grid]
    counts = {t: drawn.count(t) for t in set(drawn)}
    assert set(counts) == {Transform(s, k) for s in (0.25, 0.5, 1.0) for k in (1, 2, 3)}
    assert set(counts.values()) == {400}
    assert EQ_SCALES[0] == 0.25
    assert EQ_SCALES[-1] == 1.0
    assert draw_transform((0.0, 0.999)) == Transform(0.25, 3)


@pytest.mark.parametrize("factor", [2, 3, 4, 2.7])
def test_downscaled_images_fit_downscaled_latents_and_others_are_refused(factor):
    z, x = torch.randn(1, 2, 10, 7), torch.randn(1, 3, 80, 56)
    h, w = downscale(z, factor).shape[-2:]
    assert downscale(x, factor, 8).shape[-2:] == (8 * h, 8 * w)
    torch.testing.assert_close(downscale(torch.ones(1, 1, 10, 7), factor), torch.ones(1, 1, h, w))
    assert torch.equal(downscale(x, 1, 8), x)
    with pytest.raises(ImageError, match="30 x 32, expected sides that are multiples of 8"):
        Transform(0.5, 0).image(torch.zeros(1, 3, 30, 32), 8)
