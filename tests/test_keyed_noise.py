from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from latentae.keyed import keyed_normal


@given(st.integers(1, 4), st.integers(1, 3))
def test_noise_does_not_depend_on_how_the_batch_is_cut(parts, size):
    whole = keyed_normal((parts * size, 2, 3), seed=1, step=5, first=0)
    cut = torch.cat([keyed_normal((size, 2, 3), seed=1, step=5, first=i * size) for i in range(parts)])
    assert torch.equal(whole, cut)


def test_every_seed_step_and_position_has_its_own_noise():
    values = [
        keyed_normal((1, 4), seed, step, first)
        for seed in range(3)
        for step in range(3)
        for first in range(3)
    ]
    assert len({tuple(v.flatten().tolist()) for v in values}) == 27


def test_noise_is_standard_normal():
    noise = keyed_normal((200, 500), 0, 0, 0)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
