"""Which latents are kept, and how they are whitened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moods import MOODS, Patches, batches, moods

from latentae.errors import DataError, ModelError
from latentae.evaluation.diffusability import latents as module
from latentae.evaluation.diffusability.latents import (
    Latents,
    Whitening,
    collect,
    draw_neighbors,
    midpoint,
    nearest,
)
from latentae.models.latent_statistics import LatentStatistics, merge


@pytest.mark.parametrize("size", [1, 3, 7])
def test_the_kept_images_do_not_depend_on_batches_or_order(size):
    images = moods(20)
    every = collect(Patches(), batches(images, 20), MOODS, limit=6)
    kept = collect(Patches(), reversed(list(batches(images, size))), MOODS, limit=6)
    assert (kept.keys, kept.seen, len(kept)) == (every.keys, 20, 6)
    assert len(set(kept.keys)) == 6
    for name in ("means", "stds"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(kept, name), getattr(every, name), strict=True))
    torch.testing.assert_close(kept.features, every.features)
    rows = [int(key) for key in kept.keys]
    torch.testing.assert_close(kept.features, MOODS(images[rows]))
    torch.testing.assert_close(torch.stack(kept.means), Patches().encode(images[rows] / 127.5 - 1).mean)


def test_memory_is_bounded_in_numbers_too(monkeypatch):
    empty = collect(Patches(), [])
    assert (len(empty), empty.seen, empty.features) == (0, 0, None)
    monkeypatch.setattr(module, "NUMBERS", 5 * 48 * 16)
    assert len(collect(Patches(), batches(moods(9), 4))) == 5
    monkeypatch.setattr(module, "LATENTS", 3)
    kept = collect(Patches(), batches(moods(9), 4))
    assert len(kept) == 3
    assert all(
        mean.untyped_storage().nbytes() == mean.nbytes for mean in kept.means
    )  # a row does not hold its batch


def test_other_sizes_and_diverged_models_are_errors():
    with pytest.raises(DataError, match="one size"):
        collect(Patches(), [*batches(moods(2), 2), *batches(moods(2, 8), 2)])
    model = Patches()
    model.offset = torch.nan
    with pytest.raises(ModelError, match="latent of 000 has NaN"):
        collect(model, batches(moods(2), 2))


def test_whitened_samples_have_mean_0_and_variance_1():
    mean = torch.randn(50, 3, 4, 4) * torch.tensor([0.5, 2.0, 0.0])[:, None, None] + 3
    logvar = torch.full_like(mean, -1.0)
    logvar[:, 2] = -200.0  # exp(-200) is negligible: a constant channel
    statistics = merge([LatentStatistics.of(*pair) for pair in zip(mean, logvar.double(), strict=True)], 3)
    whitening = Whitening.of(statistics)
    white = whitening.whiten(mean + (0.5 * logvar).exp() * torch.randn(mean.shape))
    assert white[:, :2].mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (white[:, :2].std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
    assert torch.isfinite(white).all()
    torch.testing.assert_close(whitening.restore(whitening.whiten(mean)), mean)
    with pytest.raises(DataError, match="no latent"):
        Whitening.of(LatentStatistics.empty(3))


PLAIN = Whitening(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))


def latents(count: int, seed: int = 0) -> Latents:
    means = tuple(torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)))
    return Latents(tuple(f"{seed}-{number}" for number in range(count)), means, means, None, count)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 30),
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_nearest_are_those_of_the_whole_table_of_cosines(queries, references, count, block, itself, seed):
    a = latents(queries, seed)
    b = latents(references, seed + 100) if itself else a
    whitening = Whitening(
        torch.tensor([0.5, -1.0, 0.0])[:, None, None], torch.tensor([1.0, 2.0, 0.5])[:, None, None]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "AT_A_TIME", block)
        found = nearest(a.means, b.means, whitening, itself=itself, count=count)
    x, y = (
        (torch.stack(each.means) - whitening.mean).div(whitening.std).flatten(1).double().numpy()
        for each in (a, b)
    )
    cosines = (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)
    if not itself:
        np.fill_diagonal(cosines, -np.inf)
    expected = np.sort(cosines, axis=1)[:, ::-1][:, : min(count, len(y) - (not itself))]
    np.testing.assert_allclose(
        np.take_along_axis(cosines, np.array(found, dtype=int), axis=1), expected, atol=2e-6
    )  # six digits count, and fp32
    assert all(len(set(row)) == len(row) for row in found)


def test_no_latent_is_its_own_neighbour_among_the_same_images():
    same = latents(12)
    for seed in range(5):
        chosen = draw_neighbors(same, same, PLAIN, itself=False, seed=seed)
        assert all(position != row for row, position in enumerate(chosen))
    assert draw_neighbors(same, same, PLAIN, itself=True, count=1) == list(range(12))


def test_neighbours_are_drawn_by_the_softmax_of_minus_the_mean_squared_difference():
    own, references = latents(1), latents(3, seed=1)
    distances = [(mean - own.means[0]).double().square().mean().item() for mean in references.means]
    expected = np.exp(-np.array(distances)) / np.exp(-np.array(distances)).sum()
    drawn = [draw_neighbors(own, references, PLAIN, itself=True, seed=seed)[0] for seed in range(1000)]
    np.testing.assert_allclose(
        np.bincount(drawn, minlength=3) / 1000, expected, atol=0.065
    )  # four standard errors


def test_equally_near_neighbours_are_chosen_by_their_position_not_by_rounding():
    """All latents are on one line, so every cosine is 1 up to rounding."""
    line, sizes = latents(1).means[0], torch.linspace(0.3, 3.1, 40).split(1)
    references = [line * size.view(1, 1, 1) for size in sizes]
    assert nearest([line], references, PLAIN, itself=True, count=9) == [list(range(9))]


def test_draws_depend_on_the_seed_and_the_key_not_on_the_position():
    images, references = latents(8), latents(20, seed=1)
    turned = Latents(images.keys[::-1], images.means[::-1], images.stds[::-1], None, 8)
    chosen = draw_neighbors(images, references, PLAIN, itself=True)
    assert draw_neighbors(turned, references, PLAIN, itself=True) == chosen[::-1]
    assert draw_neighbors(images, references, PLAIN, itself=True, seed=1) != chosen


def test_half_way_on_the_sphere():
    a, b = torch.randn(5, 3, 2, 2, dtype=torch.float64), torch.randn(5, 3, 2, 2, dtype=torch.float64)
    x, y = (z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in (a, b))
    middle = midpoint(x, y).flatten(1)
    torch.testing.assert_close(
        middle.norm(dim=1), torch.ones(5, dtype=torch.float64)
    )  # it stays on the sphere
    torch.testing.assert_close(
        (middle * x.flatten(1)).sum(1), (middle * y.flatten(1)).sum(1)
    )  # at the same angle to both
    for row in range(5):  # Shoemake's formula for vectors of any length
        cosine = torch.nn.functional.cosine_similarity(a[row].flatten(), b[row].flatten(), dim=0)
        angle = cosine.acos()
        expected = (0.5 * angle).sin() / angle.sin() * (a[row] + b[row])
        torch.testing.assert_close(midpoint(a, b)[row], expected)
    torch.testing.assert_close(midpoint(a, a), a)
    torch.testing.assert_close(midpoint(a, -a), torch.zeros_like(a))  # opposite: there is no one arc
    torch.testing.assert_close(midpoint(torch.zeros_like(a), torch.zeros_like(a)), torch.zeros_like(a))
