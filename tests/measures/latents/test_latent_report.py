from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from known import moments
from scipy.stats import entropy, ortho_group

from latentae.errors import DataError, ImageError, ModelError
from latentae.measures.latents.report import LatentReport, active_units, effective_rank
from latentae.models.base import DiagonalGaussian


def report_of(values, images=None, batch=7):
    report = LatentReport()
    for start in range(0, len(values), batch):
        part = slice(start, start + batch)
        report.add(DiagonalGaussian(values[part]), None if images is None else images[part])
    return report


def assert_same_bits(a, b):
    a, b = a.to_arrays(), b.to_arrays()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].tobytes() == b[name].tobytes(), name


def test_every_number_is_that_of_all_latents_at_once():
    values = moments(20, 5)
    posterior = DiagonalGaussian(values.double())
    result = report_of(values, torch.rand(20, 3, 64, 64) * 2 - 1).result()
    normal = torch.distributions.Normal
    kl = (
        torch.distributions.kl_divergence(normal(posterior.mean, posterior.std), normal(0.0, 1.0))
        .sum((2, 3))
        .mean(0)
    )
    rows = posterior.mean.transpose(0, 1).flatten(1).numpy()
    covariance = np.cov(rows, bias=True)
    shares = np.linalg.svd(covariance, compute_uv=False) / np.trace(covariance)
    np.testing.assert_allclose(result["kl_nats_per_channel"], kl, rtol=1e-12)
    assert result["kl_nats_per_image"] == pytest.approx(float(kl.sum()), rel=1e-12)
    np.testing.assert_allclose(result["channel_mean_variance"], covariance.diagonal(), rtol=1e-11)
    assert result["effective_rank"] == pytest.approx(
        float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-9
    )
    assert result["active_units"] == 5
    variance = covariance.diagonal() + posterior.std.square().mean((0, 2, 3)).numpy()  # of samples
    spread = variance.mean() + rows.mean(axis=1).var()  # of all channels together
    assert result["channel_mean"] == pytest.approx(rows.mean(axis=1))
    assert result["channel_std"] == pytest.approx(np.sqrt(variance))
    assert result["channel_posterior_std"] == pytest.approx(posterior.std.mean((0, 2, 3)).tolist())
    assert (result["shift_factor"], result["scaling_factor"]) == pytest.approx((rows.mean(), spread**-0.5))
    assert result["largest_absolute_mean"] == float(posterior.mean.abs().max())
    assert set(result["spectrum"]) == {"frequency", "latent", "image", "high_frequency_share"}


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 13), st.integers(1, 13), st.integers(1, 12), st.booleans())
def test_how_images_are_batched_changes_no_bit(first, second, count, planar):
    values, images = moments(count), torch.rand(count, 1, 16, 16)
    if not planar:
        values = values.contiguous(memory_format=torch.channels_last)
    assert_same_bits(report_of(values, images, first), report_of(moments(count), images, second))


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=4))
def test_parts_merge_to_the_whole_and_survive_a_file_to_the_last_bit(cuts):
    values, images = moments(12), torch.rand(12, 3, 32, 32)
    edges = [0, *sorted(cuts), 12]
    parts = [report_of(values[a:b], images[a:b]) for a, b in itertools.pairwise(edges)]
    stored = []
    for part in parts:
        file = io.BytesIO()
        np.savez(file, **part.to_arrays())
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            stored.append(LatentReport.from_arrays(dict(arrays)))
        assert_same_bits(stored[-1], part)
    merged, again = LatentReport(), LatentReport()
    for part, copy in zip(parts, stored, strict=True):
        merged, again = merged.merge(part), again.merge(copy)
        assert_same_bits(part, copy)  # merging changes neither
    assert_same_bits(merged, again)
    whole = report_of(values, images)
    for name, value in whole.to_arrays().items():
        np.testing.assert_allclose(merged.to_arrays()[name], value, rtol=1e-10, atol=1e-9)
    assert merged.result().keys() == whole.result().keys()


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 32, 32), torch.rand(2, 3, 32, 32)])
def test_a_constant_latent_has_neither_rank_nor_spectrum(images):
    report = LatentReport()
    report.add(
        DiagonalGaussian(torch.cat([torch.full((2, 2, 4, 4), 0.1), torch.full((2, 2, 4, 4), -30.0)], 1)),
        images,
    )
    result = report.result()
    assert result["std"] < 1e-6
    assert result["effective_rank"] is None
    assert result["spectrum"] is None
    assert result["active_units"] == 0
    json.dumps(result, allow_nan=False)


def test_a_shifted_latent_keeps_its_precision():
    """Sums of squares would have lost the small variance next to the large mean."""
    values = moments(6).double() * 1e-3
    values[:, :3] += 1e4
    result = report_of(values).result()
    rows = values[:, :3].transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(result["channel_mean_variance"], rows.var(axis=1), rtol=1e-9)
    assert result["effective_rank"] == pytest.approx(
        report_of(moments(6)).result()["effective_rank"], rel=1e-5
    )


def test_no_latents_at_all():
    report = LatentReport()
    assert report.statistics is None
    assert report.to_arrays() == {}
    assert_same_bits(LatentReport.from_arrays({}), report)
    assert_same_bits(report.merge(LatentReport()), report)
    with pytest.raises(DataError, match="no latents"):
        report.result()


def test_what_does_not_belong_together_is_refused():
    report = report_of(moments(2), torch.rand(2, 3, 16, 16))
    with pytest.raises(ImageError, match=r"3 x 8 x 8 and 3 x 4 x 4"):
        report.add(DiagonalGaussian(moments(1, side=4)), torch.rand(1, 3, 8, 8))
    with pytest.raises(ImageError, match="without spectra"):
        report.merge(report_of(moments(2)))
    with pytest.raises(ImageError, match="for as many latents"):
        report.add(DiagonalGaussian(moments(2)), torch.rand(1, 3, 16, 16))
    with pytest.raises(ValueError, match="3 channels"):
        LatentReport.from_arrays({**report.to_arrays(), "kl": np.zeros(2)})


@pytest.mark.parametrize("channel", [0, 3])
def test_latents_that_are_not_finite_are_refused(channel):
    values = moments(2)
    values[1, channel, 2, 2] = torch.nan
    with pytest.raises(ModelError, match="diverged"):
        LatentReport().add(DiagonalGaussian(values))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=12), st.integers(0, 99), st.floats(1e-9, 1e9))
def test_effective_rank_is_the_exponential_of_the_entropy_in_any_basis_and_unit(values, seed, unit):
    rotation = ortho_group.rvs(len(values), random_state=seed)
    covariance = rotation @ np.diag(values) @ rotation.T * unit
    rank = effective_rank((covariance + covariance.T) / 2)
    assert rank == pytest.approx(float(np.exp(entropy(values))), rel=1e-6)
    assert 1 - 1e-9 <= rank <= len(values) + 1e-9


def test_effective_rank_of_extremes():
    assert effective_rank(np.eye(7)) == pytest.approx(7)
    assert effective_rank(np.ones((4, 4))) == pytest.approx(1)
    assert effective_rank(np.diag([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.zeros((3, 3))) is None
    assert effective_rank(np.array([[5.0]])) == pytest.approx(1)


def test_active_units_vary_by_more_than_a_hundredth():
    assert active_units(np.array([0.0, 0.0099, 0.01, 0.0101, 3.0])) == 2
