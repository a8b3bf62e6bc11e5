"""Seeds that a verb can't use are refused before any work."""

from __future__ import annotations

import pytest

import latentae
from latentae.errors import RecipeError
from latentae.keyed import MAX_SEED, run_seed
from latentae.training.recipe import load_recipe


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 2**70])
def test_a_seed_out_of_range_is_refused_before_any_work(seed, tmp_path):
    verbs = [
        lambda: latentae.evaluate("nowhere", "nowhere", out=tmp_path / "out", seed=seed),
        lambda: latentae.order("nowhere", seed=seed),
        lambda: latentae.quickstart(tmp_path / "quickstart", seed=seed),
    ]
    for verb in verbs:
        with pytest.raises(
            RecipeError, match=rf"seed is {seed}, expected a whole number from 0 to {MAX_SEED}"
        ):
            verb()
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="seed"):
        load_recipe("tiny-cpu", {"seed": seed})


@pytest.mark.parametrize("seed", [0, 3, MAX_SEED])
def test_a_seed_in_range_is_taken(seed):
    assert run_seed(seed) == seed
    assert load_recipe("tiny-cpu", {"seed": seed}).seed == seed
