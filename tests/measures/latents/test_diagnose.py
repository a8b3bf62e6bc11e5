from __future__ import annotations

import json

import pytest
import torch
from known import Blocks, blocks

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import DataError, ImageError
from latentae.measures.latents.diagnose import STEPS, diagnose, mix_latents
from latentae.measures.latents.report import LatentReport


def diagnosed(model, images, **options):
    report = LatentReport()
    with torch.no_grad():
        report.add(model.encode(to_float(images)))
    assert report.statistics is not None
    keys = [f"{number:03}" for number in range(len(images))]
    result, strip = diagnose(model, images, statistics=report.statistics, keys=keys, **options)
    json.dumps(result, allow_nan=False)
    return result, strip, report.statistics


def test_everything_is_there_for_a_trained_architecture(tiny_model, smooth_images):
    result, *_ = diagnosed(tiny_model().eval(), smooth_images(3, 32), batch_size=2)
    assert set(result) == {"images", "equivariance", "sensitivity", "half", "interpolation"}
    assert result["images"] == 3
    assert all(isinstance(row["encoder_error"], float) for row in result["equivariance"])
    assert [row["noise"] for row in result["sensitivity"]] == [0.1, 0.3, 1.0]
    assert set(result["half"]["runs"]) == {"fp16", "bf16"}
    assert result["half"]["images"] == 3
    assert result["interpolation"] == {"keys": ["000", "002"], "steps": 9, "mode": "spherical"}


def test_the_strip_goes_from_one_reconstruction_to_the_other(smooth_images):
    model, images = blocks(4), smooth_images(4, 32)
    _, strip, statistics = diagnosed(model, images)
    assert strip.dtype == torch.uint8
    assert strip.shape == (3, 32, 32 * STEPS)
    with torch.no_grad():
        z = model.encode(to_float(images[[0, 3]])).mean
        center = torch.from_numpy(statistics.mean).view(-1, 1, 1)
        middle = to_uint8(model.decode(mix_latents(z[0], z[1], 0.5, "spherical", center)[None]))[0]
        ends = to_uint8(model.decode(z))
    pictures = strip.split(32, dim=2)
    for picture, expected in ((0, ends[0]), (4, middle), (8, ends[1])):
        assert (pictures[picture].int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_one_and_four_channels(channels):
    images = torch.randint(0, 256, (2, channels, 16, 16), dtype=torch.uint8)
    result, strip, _ = diagnosed(blocks(2, channels), images)
    assert strip.shape == (channels, 16, 16 * STEPS)
    assert result["half"]["activation_maxima"]["encoder"]


def test_a_single_image_has_no_strip(smooth_images):
    result, strip, _ = diagnosed(blocks(4), smooth_images(1, 16))
    assert strip is None
    assert "two images" in result["interpolation"]["missing"]
    assert result["interpolation"]["steps"] == 9


def test_a_model_that_can_not_be_traced_says_why(smooth_images):
    class Branching(Blocks):
        def _encode(self, x, keep_features):
            return super()._encode(x if x.sum() > 0 else -x, keep_features)

    result, strip, _ = diagnosed(Branching(4), smooth_images(2, 16))
    assert "can't trace this Branching" in result["half"]["missing"]
    assert "\n" not in result["half"]["missing"]
    assert strip is not None


def test_a_decoder_that_overflows_between_images_has_no_strip(smooth_images):
    model = blocks(4)
    _, strip, statistics = diagnosed(model, smooth_images(2, 16))
    model._decode = lambda z, keep_features: (torch.full((len(z), 3, 16, 16), torch.inf), None)
    result, strip = diagnose(model, smooth_images(2, 16), statistics=statistics, keys=["a", "b"])
    json.dumps(result, allow_nan=False)
    assert strip is None
    assert "NaN or infinite" in result["interpolation"]["missing"]
    assert all(row["psnr"] is None for row in result["sensitivity"])


def test_no_images_too_few_keys_and_wrong_sizes_are_refused(smooth_images):
    *_, statistics = diagnosed(blocks(4), smooth_images(1, 16))
    with pytest.raises(DataError, match="at least one image"):
        diagnose(blocks(4), smooth_images(2, 16)[:0], statistics=statistics, keys=[])
    with pytest.raises(DataError, match="a key for each"):
        diagnose(blocks(4), smooth_images(2, 16), statistics=statistics, keys=["a"])
    with pytest.raises(ImageError, match="multiples of 4"):
        diagnose(blocks(4), smooth_images(2, 18), statistics=statistics, keys=["a", "b"])


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
