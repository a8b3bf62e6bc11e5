from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentae.errors import ImageError, OutputError
from latentae.pages.images import (
    BRIGHTEST,
    TICKS,
    color_position,
    error_map,
    image_grid,
    png_bytes,
    read_png,
    scale_gradient,
    shrink,
    write_png,
)


def plain(value: int, height: int, width: int) -> torch.Tensor:
    return torch.full((3, height, width), value, dtype=torch.uint8)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_a_grid_shows_every_pixel_of_every_image(sizes: list[tuple[int, int]], columns: int, padding: int):
    rows = [[plain(value + i, *size) for i, size in enumerate(sizes)] for value in (1, 101)]
    grid = image_grid(rows, padding=padding, columns=columns)
    for value in (1, 101):
        for index, (height, width) in enumerate(sizes):
            assert int((grid[0] == value + index).sum()) == height * width


def test_rows_are_under_each_other_and_bad_grids_are_refused():
    grid = image_grid([[plain(1, 4, 6)], [plain(2, 4, 6)]], padding=2)
    assert grid.shape == (3, 2 + 4 + 2 + 4 + 2, 10)
    assert (grid[:, 2:6, 2:8] == 1).all()
    assert (grid[:, 8:12, 2:8] == 2).all()
    assert (grid[:, :2] == 255).all()
    gray, alpha = (
        image_grid([[plain(7, 2, 2)[:1]]]),
        image_grid([[torch.cat([plain(7, 2, 2), plain(0, 2, 2)[:1]])]]),
    )
    assert torch.equal(gray, alpha)
    assert torch.equal(gray, image_grid([[plain(7, 2, 2)]]))
    with pytest.raises(ImageError, match="equal length"):
        image_grid([[plain(1, 2, 2)], []])
    with pytest.raises(ImageError, match="equal length"):
        image_grid([])
    with pytest.raises(ImageError, match="uint8"):
        image_grid([[torch.zeros(3, 4, 4)]])


def test_png_is_lossless_and_written_whole(tmp_path):
    image = torch.randint(0, 256, (3, 7, 11), dtype=torch.uint8)
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), image.permute(1, 2, 0).numpy())
    assert np.array_equal(np.array(Image.open(io.BytesIO(png_bytes(image)))), image.permute(1, 2, 0).numpy())
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        write_png(tmp_path / "folder", image)


def test_shrinking_averages_and_files_of_any_color_are_read(tmp_path):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :2, :2] = 200
    assert shrink(image, 4) is image
    assert torch.equal(shrink(image, 2)[0], torch.tensor([[200, 0], [0, 0]], dtype=torch.uint8))
    Image.new("L", (3, 2), 90).save(tmp_path / "gray.png")
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_png(tmp_path / "gray.png") == 90).all()
    assert (read_png(tmp_path / "clear.png") == 255).all()


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
