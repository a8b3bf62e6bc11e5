from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from latentae.data.order import is_held_out
from latentae.measures.latents.probe import HELD_OUT, fit_probe, pooled, probe_report


@pytest.fixture(scope="module")
def digits():
    """Digits as gray latents: fp32 [1797, 1, 8, 8], and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    return torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(classes)


def test_the_probe_is_scikit_learns(digits):
    features = pooled(
        digits[0][:300].repeat(1, 4, 1, 1) ** torch.tensor([1.0, 0.5, 2.0, 3.0]).view(4, 1, 1)
    ).double()
    classes = torch.arange(300) % 3
    probe = fit_probe(features, classes, 3)
    standard = (features - features.mean(0)) / features.std(0, correction=0)
    theirs = LogisticRegression(C=1.0, max_iter=5000, tol=1e-9).fit(standard.numpy(), classes.numpy())
    np.testing.assert_allclose(probe.weight.numpy(), theirs.coef_, atol=1e-4)
    assert (probe.predict(features).numpy() == theirs.predict(standard.numpy())).all()


def test_the_probe_is_tested_on_images_it_was_not_fitted_on():
    keys = [f"image-{number}" for number in range(200)]
    random = torch.randn(200, 150, dtype=torch.float64)  # enough numbers to learn any labels by heart
    report = probe_report(keys, ["a" if number % 2 else "b" for number in range(200)], random)
    assert report["training_accuracy"] == 1.0
    assert report["accuracy"] < 0.75
    assert report["tested_on"] == sum(is_held_out(key, HELD_OUT) for key in keys)


@pytest.mark.parametrize(("size", "parts"), [((6, 8), 4), ((5, 7), 4), ((1, 4), 2), ((1, 1), 1)])
def test_pooled_latents_are_means_of_quarters(size, parts):
    latents = torch.randn(3, 2, *size)
    found = pooled(latents)
    assert found.shape == (3, 2 * parts)
    assert found.dtype == torch.float32
    rows = [slice(0, -(-size[0] // 2)), slice(size[0] // 2, None)][: 2 if size[0] > 1 else 1]
    columns = [slice(0, -(-size[1] // 2)), slice(size[1] // 2, None)][: 2 if size[1] > 1 else 1]
    expected = torch.stack(
        [latents.double()[:, :, r, c].mean((2, 3)) for r in rows for c in columns], dim=2
    ).flatten(1)
    torch.testing.assert_close(found, expected.float())
    torch.testing.assert_close(pooled(latents[1:2]), found[1:2], rtol=0, atol=0)
