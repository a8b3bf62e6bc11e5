from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentae.data.transforms import random_crop_flip, resize_and_center_crop, to_float, to_uint8
from latentae.errors import ImageError


def photo(height: int, width: int) -> torch.Tensor:
    """Smooth colours with some noise: ramps show a shift, noise shows the filter."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    pixels = np.stack([x * 200 // width + noise, y * 200 // height + noise, 255 - (x + y) * 200 // (height + width)], 2)
    return torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1)


def difference(a: torch.Tensor, b: torch.Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


@pytest.mark.parametrize(("height", "width", "size"), [(96, 96, 32), (60, 90, 32), (90, 61, 40), (20, 30, 32)])
def test_resize_and_crop_agree_with_pil_and_torchvision(height, width, size):
    image = photo(height, width)
    ours = resize_and_center_crop(image, size)
    assert ours.shape == (3, size, size)
    short = min(height, width)
    to = (int(size * width / short), int(size * height / short))
    left, top = round((to[0] - size) / 2), round((to[1] - size) / 2)
    pil = (
        Image.fromarray(image.permute(1, 2, 0).numpy())
        .resize(to, Image.Resampling.BICUBIC)
        .crop((left, top, left + size, top + size))
    )
    assert difference(ours, torch.from_numpy(np.array(pil)).permute(2, 0, 1)) <= 1
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    theirs = vision.center_crop(vision.resize(image, size, interpolation=InterpolationMode.BICUBIC, antialias=True), [size, size])
    assert difference(ours, theirs) <= 1


def test_a_square_of_the_right_size_is_left_alone():
    image = photo(32, 32)
    assert torch.equal(resize_and_center_crop(image, 32), image)
    assert torch.equal(random_crop_flip(image, 32, seed=5, flip=False), image)


def test_a_thin_strip_does_not_fill_the_memory():
    assert resize_and_center_crop(torch.zeros(3, 1, 2_000_000, dtype=torch.uint8), 256).shape == (3, 256, 256)
    assert random_crop_flip(torch.zeros(3, 2_000_000, 1, dtype=torch.uint8), 256, seed=0).shape == (3, 256, 256)


@given(st.integers(1, 70), st.integers(1, 70), st.integers(8, 40), st.integers(0, 2**64 - 1), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_random_crop_has_its_size_and_depends_on_its_arguments_alone(height, width, size, seed, low, high):
    image = photo(height, width)
    scale = (min(low, high), max(low, high))
    crop = random_crop_flip(image, size, scale=scale, seed=seed)
    assert crop.shape == (3, size, size)
    assert crop.dtype == torch.uint8
    assert torch.equal(crop, random_crop_flip(image.contiguous(), size, scale=scale, seed=seed))


def test_native_crops_are_pieces_of_the_image():
    image = torch.arange(30 * 40).remainder(251).to(torch.uint8).view(1, 30, 40).repeat(3, 1, 1)
    windows = image.unfold(1, 8, 1).unfold(2, 8, 1)[0]
    for seed in range(20):
        crop = random_crop_flip(image, 8, scale=(0, 0), seed=seed, flip=False)
        assert (windows == crop[0]).all(-1).all(-1).any()


def test_crops_reach_every_border_every_scale_and_both_hands():
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[0] = torch.arange(60).to(torch.uint8)  # red is the column, so its range is the crop
    image[1] = torch.arange(40).to(torch.uint8)[:, None]
    crops = [random_crop_flip(image, 10, scale=(0, 1), seed=seed) for seed in range(300)]
    widths = [int(crop[0].max()) - int(crop[0].min()) for crop in crops]
    assert min(widths) <= 10
    assert max(widths) >= 33
    assert min(int(crop[0].min()) for crop in crops) <= 1
    assert max(int(crop[0].max()) for crop in crops) >= 58
    assert min(int(crop[1].min()) for crop in crops) <= 1
    assert max(int(crop[1].max()) for crop in crops) >= 38
    mirrored = sum(bool(crop[0, 0, 0] > crop[0, 0, -1]) for crop in crops)
    assert 110 < mirrored < 190
    assert all(
        crop[0, 0, 0] < crop[0, 0, -1] for crop in (random_crop_flip(image, 10, seed=seed, flip=False) for seed in range(20))
    )


def test_a_crop_is_the_same_on_every_machine():
    # Recorded once: a change here changes the data of every saved run.
    crop = random_crop_flip(
        torch.arange(900).remainder(256).to(torch.uint8).view(1, 30, 30).repeat(3, 1, 1), 8, scale=(0, 0), seed=7
    )
    assert crop[0, 0].tolist() == [196, 195, 194, 193, 192, 191, 190, 189]


@pytest.mark.parametrize(
    "image", [torch.zeros(3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.uint8), torch.zeros(3, 0, 8, dtype=torch.uint8)]
)
def test_what_is_no_decoded_image_is_refused(image):
    with pytest.raises(ImageError, match="uint8"):
        resize_and_center_crop(image, 8)


def test_all_levels_survive_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1).to(memory_format=torch.channels_last)
    values = to_float(levels)
    assert values.dtype == torch.float32
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert (values.min(), values.max()) == (-1, 1)
    assert torch.equal(to_uint8(values), levels)
    assert torch.equal(to_uint8(values.double()), levels)


def test_levels_are_rounded_and_clamped():
    assert to_uint8(torch.tensor([-9.0, -1.0, -0.9969, 0.9967, 1.0, 9.0])).tolist() == [0, 0, 0, 255, 255, 255]
    assert to_uint8(torch.tensor([0.1], requires_grad=True)).tolist() == [140]
