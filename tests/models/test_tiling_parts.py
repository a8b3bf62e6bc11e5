from __future__ import annotations

import itertools

import pytest
import torch
from small_models import halo
from torch import nn

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.blocks import Attention
from latentae.models.latent_statistics import Moments
from latentae.models.presets import preset
from latentae.models.tiling.blended import SHARE, Source, Tiles, blend, estimate, samples, weights
from latentae.models.tiling.steps import (
    Convolution,
    decoder_steps,
    encoder_steps,
    run,
    split_decoder,
    split_encoder,
)
from latentae.models.tiling.strips import Store, affine, moments_of, stream


def model() -> AutoencoderKL:
    config = preset("kl-f8", block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1)
    return AutoencoderKL(config).eval().double()


@pytest.mark.parametrize("step", ["encode", "decode"])
@torch.no_grad()
def test_without_an_overlap_borders_of_tiles_show_no_further_than_the_halo(step):
    """tests/models/test_tiling.py has tiles that overlap enough: none shows there."""
    if step == "encode":
        steps, x, unit, scale = split_encoder(encoder_steps(model()))[0], torch.randn(1, 3, 160, 240), 1, 8
    else:
        steps, x, unit, scale = split_decoder(decoder_steps(model()))[1], torch.randn(1, 16, 20, 30), 8, 1
    x, known = x.double(), {}

    def recorded(norm, x):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        known[norm] = affine(norm, Moments(1, mean.numpy(), variance.numpy()))
        return known[norm]

    whole = run(steps, x, recorded)
    found = torch.zeros_like(whole)

    def cut(top, left, height, width):
        return x[:, :, top // unit : (top + height) // unit, left // unit : (left + width) // unit]

    def add(top, left, part):
        found[:, :, top : top + part.shape[2], left : left + part.shape[3]] += part

    reach = halo(steps, unit)
    assert 16 < reach < 64
    blend(steps, Source(cut, x, 160, 240, 8), add, lambda norm, _: known[norm], Tiles(80, 0, 8), scale)
    difference = (found - whole).abs() / whole.std()
    assert difference.max() > 1e-2
    inner = slice(-(-reach // scale), (80 - reach) // scale)
    assert difference[:, :, inner, inner].max() < 1e-12


def test_weights_add_up_to_one_and_tiles_cover_everything():
    for length, side, overlap in (
        (640, 128, 32),
        (1000, 256, 64),
        (264, 256, 0),
        (128, 256, 64),
        (4096, 512, 64),
    ):
        tiles = Tiles(side, overlap, 8)
        starts, size = tiles.along(length)
        assert size <= side
        assert not any(number % 8 for number in (size, *starts))
        assert all(overlap - 8 <= a + size - b <= overlap + 16 for a, b in itertools.pairwise(starts))
        total = torch.zeros(length, dtype=torch.float64)
        for start, weight in zip(starts, weights(starts, size, length), strict=True):
            total[start : start + len(weight)] += weight
        torch.testing.assert_close(total, torch.ones_like(total))


def test_moments_are_those_of_all_rows_even_where_the_mean_is_large():
    x = torch.randn(1, 4, 50, 20) * torch.tensor([1, 0.1, 10, 1]).view(1, -1, 1, 1) + torch.tensor(
        [0, 100, 0, -5]
    ).view(1, -1, 1, 1)
    moments = Moments.empty(4)
    for strip in x.split([1, 20, 9, 20], dim=2):
        moments = moments.merge(moments_of(strip))
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments.mean, mean.numpy(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(moments.m2 / 1000, variance.numpy(), rtol=1e-5, atol=0)
    norm = nn.GroupNorm(2, 4, eps=1e-6)
    nn.init.normal_(norm.weight)
    scale, shift = affine(norm, moments)
    torch.testing.assert_close(
        x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1), norm(x), rtol=1e-4, atol=1e-4
    )
    y = 2 + torch.randn(1, 4, 4, 5)
    weighted, repeated = moments_of(x).merge(moments_of(y, 3.0)), moments_of(x)
    for part in (y, y, y):
        repeated = repeated.merge(moments_of(part))
    assert weighted.count == repeated.count
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(weighted.m2, repeated.m2)


@torch.no_grad()
def test_attention_looks_at_a_grid_where_there_are_too_many_places():
    attention = Attention(16, 4).double()
    blocks = torch.randn(1, 16, 6, 9, dtype=torch.float64)
    x = blocks.repeat_interleave(2, 2).repeat_interleave(2, 3)  # every second pixel repeats its neighbor

    def attended(keys):
        with Store(None, torch.float64) as maps:
            source = maps.new(12, 18, 16, 8)
            source.write(0, x)
            return stream([attention], source, maps, 30 * 64, keys).whole(x)

    whole = attention(x)
    for keys in (None, 216, 54):
        torch.testing.assert_close(attended(keys), whole, rtol=0, atol=1e-12)
    assert (attended(6) - whole).abs().max() > 1e-3


def test_samples_lie_in_the_image_and_grow_with_it():
    def area(height, width):
        return sum(high * wide for boxes in samples(height, width, 8, 128) for _, _, high, wide in boxes)

    for height, width in ((512, 512), (1024, 768), (24, 4000), (640, 136)):
        for boxes in samples(height, width, 8, 128):
            assert len(set(boxes)) == len(boxes)
            for top, left, high, wide in boxes:
                assert not any(value % 8 for value in (top, left, high, wide))
                assert 0 <= top <= height - high
                assert 0 <= left <= width - wide
            assert sum(high * wide for _, _, high, wide in boxes) <= 128**2
    assert area(2048, 2048) == pytest.approx(2048**2 / SHARE, rel=0.1)


@torch.no_grad()
def test_statistics_from_samples_are_nearer_than_those_of_a_small_copy():
    steps = split_encoder(encoder_steps(model()))[0]
    image = torch.rand(1, 3, 512, 512, dtype=torch.float64) - 0.5
    image[:, :, :, 300:] *= 0.2  # fine structure, more on one side
    image[:, :, 200:] += 0.3
    true, small = {}, {}
    for kept, x in ((true, image), (small, nn.functional.interpolate(image, scale_factor=0.25, mode="area"))):

        def norms(norm, x, kept=kept):
            variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
            kept[norm] = affine(norm, Moments(1, mean.numpy(), variance.numpy()))
            return kept[norm]

        run(steps, x, norms)
    source = Source(
        lambda top, left, high, wide: image[:, :, top : top + high, left : left + wide], image, 512, 512, 8
    )
    estimated = estimate(steps, source, 128)
    assert set(estimated) == set(true)
    for norm, (scale, _) in true.items():
        assert (estimated[norm][0] / scale - 1).abs().max() < 0.1
        assert (small[norm][0] / scale - 1).abs().max() > 0.1


def test_weighted_samples_look_more_like_the_whole_than_samples_do():
    norm, crops, side = nn.GroupNorm(8, 8, eps=0.0).double(), [], 512
    image = nn.functional.interpolate(
        torch.randn(1, 8, 10, 10, dtype=torch.float64), size=(side, side), mode="bilinear"
    )

    def cut(top, left, high, wide):
        crops.append(
            image[:, :, top + 8 : top + high - 8, left + 8 : left + wide - 8].flatten(2)
        )  # its margins do not count
        return image[:, :, top : top + high, left : left + wide]

    steps = [Convolution(nn.Conv2d(8, 8, 1).double(), norm)]
    scale, shift = estimate(steps, Source(cut, image, side, side, 8), 256)[norm]
    variance, mean = torch.var_mean(image, (0, 2, 3), correction=0)
    plain_variance, plain_mean = torch.var_mean(torch.cat(crops, 2), (0, 2), correction=0)
    assert (-shift / scale - mean).norm() < 0.7 * (plain_mean - mean).norm()
    assert (scale**-2 - variance).norm() < 0.7 * (plain_variance - variance).norm()
