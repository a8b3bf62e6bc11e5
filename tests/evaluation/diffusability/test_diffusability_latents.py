"""Which latents are kept, and how they are whitened."""

from __future__ import annotations

import pytest
import torch
from moods import MOODS, Patches, batches, moods

from latentae.errors import DataError, ModelError
from latentae.evaluation.diffusability import latents
from latentae.evaluation.diffusability.latents import Whitening, collect
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
    monkeypatch.setattr(latents, "NUMBERS", 5 * 48 * 16)
    assert len(collect(Patches(), batches(moods(9), 4))) == 5
    monkeypatch.setattr(latents, "LATENTS", 3)
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
