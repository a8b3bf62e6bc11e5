from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from latentae.errors import DataError, ImageError, ModelError
from latentae.exporting.preview import Preview, PreviewFit
from latentae.exporting.scaling import LatentScaling

SCALING, SHIFT = 0.7, 0.3


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Latents of three sizes, and images that they explain in part."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for count, height, width in ((2, 5, 4), (1, 3, 7), (4, 6, 6)):
        latents = 2 * torch.randn(count, 5, height, width, generator=generator, dtype=torch.float64) + 0.5
        mixed = torch.einsum(
            "bzhw,zc->bchw", latents, torch.linspace(-0.2, 0.3, 15, dtype=torch.float64).view(5, 3)
        )
        images = mixed.repeat_interleave(8, 2).repeat_interleave(8, 3)
        made.append(
            (latents, images + 0.5 * torch.randn(images.shape, generator=generator, dtype=torch.float64))
        )
    return made


def fit(data: list[tuple[torch.Tensor, torch.Tensor]], channels: int = 5) -> Preview:
    preview = PreviewFit(channels)
    for latents, images in data:
        preview.add(latents, images)
    return preview.result(LatentScaling(SCALING, SHIFT, "given"))


def rgb(preview: Preview, latents: torch.Tensor) -> torch.Tensor:
    """What the card's snippet computes."""
    factors, bias = (
        torch.tensor(values, dtype=latents.dtype)
        for values in (preview.latent_rgb_factors, preview.latent_rgb_factors_bias)
    )
    return torch.einsum("bzhw,zc->bchw", latents, factors) + bias.view(1, 3, 1, 1)


def test_it_is_numpys_least_squares_over_everything_at_once():
    data = batches()
    inputs = np.concatenate([((z - SHIFT) * SCALING).movedim(1, -1).reshape(-1, 5).numpy() for z, _ in data])
    shrunk = [x.reshape(*x.shape[:2], x.shape[2] // 8, 8, x.shape[3] // 8, 8).mean((3, 5)) for _, x in data]
    colours = np.concatenate([x.movedim(1, -1).reshape(-1, 3).numpy() for x in shrunk])
    design = np.concatenate([inputs, np.ones((len(inputs), 1))], axis=1)
    expected, residual, *_ = np.linalg.lstsq(design, colours, rcond=None)

    preview = fit(data)
    np.testing.assert_allclose(preview.latent_rgb_factors, expected[:5], rtol=0, atol=1e-12)
    np.testing.assert_allclose(preview.latent_rgb_factors_bias, expected[5], rtol=0, atol=1e-12)
    r2 = 1 - residual.sum() / np.square(colours - colours.mean(0)).sum()
    assert preview.r2 == pytest.approx(r2, abs=1e-12)
    assert 0.5 < r2 < 0.999
    assert preview.images == 7


def test_an_exact_relation_is_found_and_applied():
    latents = torch.randn(3, 4, 6, 5)
    factors, bias = torch.randn(4, 3) / 4, torch.tensor([0.1, -0.2, 0.3])
    normalised = (latents - SHIFT) * SCALING
    colours = torch.einsum("bzhw,zc->bchw", normalised, factors) + bias.view(1, 3, 1, 1)
    preview = fit([(latents, F.interpolate(colours, scale_factor=4, mode="nearest"))], channels=4)
    assert preview.r2 == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(torch.tensor(preview.latent_rgb_factors), factors, rtol=0, atol=1e-5)
    torch.testing.assert_close(rgb(preview, normalised), colours, rtol=0, atol=1e-5)


def test_the_json_is_what_comfyui_applies():
    """ComfyUI: linear(latent channels last, factors transposed, bias), then (x + 1) / 2."""
    preview = fit(batches())
    values = json.loads(json.dumps(preview.to_json(), allow_nan=False))
    factors, bias = (
        torch.tensor(values["latent_rgb_factors"]),
        torch.tensor(values["latent_rgb_factors_bias"]),
    )
    latents = torch.randn(1, 5, 4, 4)
    theirs = F.linear(latents[0].movedim(0, -1), factors.transpose(0, 1), bias)
    torch.testing.assert_close(rgb(preview, latents)[0].movedim(0, -1), theirs)
    assert values["r2"] == preview.r2
    assert (values["scaling_factor"], values["shift_factor"], values["images"]) == (SCALING, SHIFT, 7)


def test_channels_that_say_nothing_new_do_no_harm():
    """A dead channel gets no weight, twins share theirs, and constant latents leave the mean
    colour.
    """
    data = [(torch.cat([z, z[:, :1], torch.full_like(z[:, :1], 3)], dim=1), x) for z, x in batches()]
    preview, plain = fit(data, channels=7), fit(batches())
    assert preview.r2 == pytest.approx(plain.r2, abs=1e-9)
    np.testing.assert_allclose(preview.latent_rgb_factors[6], 0, atol=1e-9)
    np.testing.assert_allclose(preview.latent_rgb_factors[0], preview.latent_rgb_factors[5], atol=1e-9)

    image = torch.rand(2, 3, 8, 8) * 2 - 1
    still = fit([(torch.full((2, 5, 2, 2), 1.5), image)])
    assert still.r2 == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(still.latent_rgb_factors_bias, image.mean((0, 2, 3)), atol=1e-6)


def test_images_of_one_colour_have_no_r2():
    preview = fit([(torch.randn(2, 5, 3, 3), torch.full((2, 3, 24, 24), 0.25))])
    assert preview.r2 is None
    np.testing.assert_allclose(preview.latent_rgb_factors_bias, 0.25, atol=1e-9)


def test_what_does_not_fit_is_refused():
    fitting = PreviewFit(4)
    with pytest.raises(DataError, match="has no images"):
        fitting.result(LatentScaling(1.0, 0.0, ""))
    with pytest.raises(ModelError, match=r"expected \[B, 4, h, w\]"):
        fitting.add(torch.zeros(1, 5, 2, 2), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ImageError, match=r"expected RGB: \[1, 3, H, W\]"):
        fitting.add(torch.zeros(1, 4, 2, 2), torch.zeros(1, 1, 8, 8))
    with pytest.raises(DataError, match="not finite"):
        fitting.add(torch.full((1, 4, 2, 2), torch.nan), torch.zeros(1, 3, 8, 8))
