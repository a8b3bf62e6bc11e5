from __future__ import annotations

import pytest
import torch

from latentae.errors import ImageError
from latentae.pages.error_map import BRIGHTEST, TICKS, color_position, error_map, scale_gradient


def lightness(pixels: torch.Tensor) -> torch.Tensor:
    """[3, H, W] -> luma, [H, W]."""
    return (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * pixels.float()).sum(0)


def test_larger_errors_are_lighter_up_to_the_brightest():
    errors = torch.arange(0, 256, dtype=torch.uint8)[None, None, :]
    light = lightness(error_map(torch.zeros_like(errors), errors))[0]
    until = int(BRIGHTEST) + 1
    assert (light[1:until] > light[: until - 1]).all()
    assert (light[until:] == light[until - 1]).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_map_is_of_the_error_alone_and_no_error_is_black(channels):
    base = torch.randint(0, 200, (channels, 5, 7))
    error = torch.randint(0, 50, (channels, 5, 7))
    a, b = base.to(torch.uint8), (base + error).to(torch.uint8)
    colors = error_map(a, b)
    assert (colors.dtype, colors.shape) == (torch.uint8, (3, 5, 7))
    assert torch.equal(colors, error_map(b, a))
    assert torch.equal(colors, error_map(torch.zeros_like(a), error.to(torch.uint8)))  # for any image
    alone = error_map(a[:, :1, :1], b[:, :1, :1])
    assert torch.equal(colors[:, :1, :1], alone)  # and for any neighbours
    assert error_map(a, a).max() < 8


def test_ticks_are_evenly_spaced_on_the_scale():
    places = color_position(torch.tensor(TICKS, dtype=torch.float64))
    assert torch.allclose(places, torch.linspace(0, 1, len(TICKS), dtype=torch.float64))
    gradient = scale_gradient()
    assert gradient.startswith("linear-gradient(to right, rgb(0 0 3)")
    assert '"' not in gradient


@pytest.mark.parametrize(("shape", "other"), [((3, 4, 4), (3, 4, 5)), ((1, 3, 4, 4), (1, 3, 4, 4))])
def test_other_shapes_and_types_are_one_line(shape, other):
    with pytest.raises(ImageError, match="expected"):
        error_map(torch.zeros(shape, dtype=torch.uint8), torch.zeros(other, dtype=torch.uint8))
    with pytest.raises(ImageError, match="expected"):
        error_map(torch.zeros(3, 4, 4), torch.zeros(3, 4, 4))
