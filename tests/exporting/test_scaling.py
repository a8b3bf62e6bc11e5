"""Normalisation folded into the weights, against the same normalisation done outside, in fp64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentae import AutoencoderKL, export
from latentae.errors import RecipeError
from latentae.exporting.scaling import fold_normalization
from latentae.files import read_json, write_json
from latentae.models.config import AutoencoderKLConfig
from latentae.models.presets import preset
from latentae.models.pretrained import resolve_model

MEAN, STD = [0.5, -1.5, 0.25, 3.0], [0.5, 2.0, 8.0, 0.125]


def config(**overrides: object) -> AutoencoderKLConfig:
    return preset("kl-f8", block_out_channels=(8, 8, 16, 16), norm_num_groups=4, **overrides)


def by_channel(values: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)


@pytest.mark.parametrize("quant", [True, False])
@pytest.mark.parametrize("post", [True, False])
def test_it_is_the_normalisation_done_outside(quant, post):
    model = AutoencoderKL(config(use_quant_conv=quant, use_post_quant_conv=post)).double().eval()
    folded = fold_normalization(model, MEAN, STD)
    assert (folded.config.scaling_factor, folded.config.shift_factor) == (1.0, 0.0)
    assert folded.config.use_quant_conv
    assert folded.config.use_post_quant_conv
    x, n = torch.rand(2, 3, 32, 48, dtype=torch.float64) * 2 - 1, torch.randn(2, 4, 4, 6, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = model.encode(x), folded.encode(x)
        torch.testing.assert_close(
            ours.mean, (theirs.mean - by_channel(MEAN)) / by_channel(STD), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(ours.std, theirs.std / by_channel(STD), rtol=1e-12, atol=0)
        torch.testing.assert_close(
            folded.decode(n), model.decode(n * by_channel(STD) + by_channel(MEAN)), rtol=0, atol=1e-12
        )


def test_rounding_in_fp32_is_all_that_is_lost():
    """With statistics of the latents themselves, as an export has them: no further from fp64 than
    the model in fp32 is.
    """
    model = AutoencoderKL(config()).eval()
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = model.encode(x).sample()
        folded = fold_normalization(model, latents.mean((0, 2, 3)), latents.std((0, 2, 3)))
        plain, made = (m.decode(m.encode(x).mode()).double() for m in (model, folded))
        exact = model.double().decode(model.encode(x.double()).mode())
    assert (made - exact).abs().max() <= 2 * (plain - exact).abs().max() + 4e-6


def test_the_model_itself_stays_as_it_is():
    model = AutoencoderKL(config(use_quant_conv=False)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_normalization(model, MEAN, STD)
    assert folded.training
    with torch.no_grad():
        folded.encoder.conv_in.weight.zero_()
    assert model.quant_conv is None
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ([0.0] * 3, STD, "3 and 4 numbers, the model has 4"),
        (MEAN, [1.0, 0.0, 1.0, 1.0], "not positive"),
        ([0.0, float("nan"), 0.0, 0.0], STD, "not finite"),
    ],
)
def test_statistics_that_can_not_be_folded(mean, std, message):
    with pytest.raises(RecipeError, match=message):
        fold_normalization(AutoencoderKL(config()), mean, std)


@pytest.fixture
def saved(save_model, tmp_path) -> tuple[Path, Path]:
    """A model folder and a file of statistics as encode writes them."""
    model = save_model(tmp_path / "model", config())
    values = {
        "model": resolve_model(model).fingerprint,
        "samples": 500,
        "scaling_factor": 0.75,
        "shift_factor": -0.125,
    }
    write_json(tmp_path / "statistics.json", {**values, "latents_mean": MEAN, "latents_std": STD})
    return model, tmp_path / "statistics.json"


def test_a_folded_export_needs_no_scaling(saved, tmp_path):
    model, statistics = saved
    summary = export(model, tmp_path / "vae", fold_normalization=True, statistics=statistics)
    assert (summary["scaling_factor"], summary["shift_factor"]) == (1.0, 0.0)
    plain, folded = AutoencoderKL.from_pretrained(model), AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert (folded.config.scaling_factor, folded.config.shift_factor) == (1.0, 0.0)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = (plain.encode(x).mode() - by_channel(MEAN, torch.float32)) / by_channel(STD, torch.float32)
        torch.testing.assert_close(folded.encode(x).mode(), latents, rtol=1e-5, atol=4e-6)
    card = (tmp_path / "vae/README.md").read_text()
    assert "nothing to scale or shift" in card
    assert "folded into the weights, by statistics over 500 images" in card
    assert read_json(tmp_path / "vae/latent_statistics.json")["folded_into_the_weights"] is True
    assert export(model, tmp_path / "vae", fold_normalization=True, statistics=statistics) == summary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs the statistics"),
        ({"statistics": "statistics.json", "scaling_factor": 0.5}, "leave out scaling_factor"),
    ],
)
def test_folding_without_statistics_or_with_a_factor_is_refused(
    options, message, saved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        export(saved[0], tmp_path / "vae", fold_normalization=True, **options)
    assert not (tmp_path / "vae").exists()
