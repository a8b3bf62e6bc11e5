from __future__ import annotations

import numpy as np
import torch

from latentae.losses.adversarial import hinge_discriminator, hinge_generator


def test_hinge_equals_the_plain_formula_in_fp64():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(4, 1, 3, 5)) * 2, rng.normal(size=(4, 1, 3, 5)) * 2
    expected = 0.5 * (np.maximum(0, 1 - real) + np.maximum(0, 1 + fake)).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(hinge_discriminator(torch.tensor(real), torch.tensor(fake)).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(hinge_generator(torch.tensor(fake)).numpy(), -fake.mean(axis=(1, 2, 3)), rtol=1e-12)


def test_a_discriminator_that_is_right_by_a_margin_has_no_gradient():
    real, fake = torch.full((1, 1, 2, 2), 1.5, requires_grad=True), torch.full((1, 1, 2, 2), -1.5, requires_grad=True)
    hinge_discriminator(real, fake).sum().backward()
    assert not real.grad.any()
    assert not fake.grad.any()
