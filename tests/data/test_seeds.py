"""A seed is an integer of any type; anything else is refused wherever a seed enters."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

import latentae
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions
from latentae.data.order import order
from latentae.data.streaming import StreamLoader
from latentae.data.transforms import random_crop_flip
from latentae.errors import RecipeError
from latentae.evaluation.diffusability.flow import TinyTransformer
from latentae.examples.diffusion import sample as diffuse
from latentae.keyed import derive_seed, digest, keyed_normal, keyed_uniform, whole_seed
from latentae.measures.metrics import bootstrap_mean
from latentae.training.recipe import load_recipe

SAME = [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor([3])]
REFUSED = [
    3.0,
    3.5,
    np.float64(3),
    torch.tensor(3.0),
    torch.tensor([1, 2]),
    "3",
    None,
    np.bool_(True),
    torch.Generator(),
]
IMAGE = torch.arange(3 * 20 * 20).reshape(3, 20, 20).to(torch.uint8)


@pytest.mark.parametrize("seed", SAME, ids=lambda seed: type(seed).__name__)
def test_equal_numbers_are_the_same_seed(seed):
    assert type(whole_seed(seed)) is int
    assert derive_seed("x", seed, "y") == derive_seed("x", 3, "y")
    assert derive_seed(np.str_("x"), 3) == derive_seed("x", 3)
    assert digest(seed, "x") == digest(3, "x")
    assert torch.equal(keyed_normal((2, 3), seed, 1, 0), keyed_normal((2, 3), 3, 1, 0))
    assert torch.equal(keyed_uniform(2, seed, 1, 0, "x"), keyed_uniform(2, 3, 1, 0, "x"))
    assert bootstrap_mean([1.0, 2.0, 4.0], seed=seed) == bootstrap_mean([1.0, 2.0, 4.0], seed=3)
    assert torch.equal(random_crop_flip(IMAGE, 8, seed=seed), random_crop_flip(IMAGE, 8, seed=3))
    assert load_recipe("tiny-cpu", {"seed": seed if np.ndim(seed) == 0 else 3}).seed == 3


def test_true_is_one():
    assert derive_seed("x", True) == derive_seed("x", 1)
    assert digest(True) == digest(1)


def test_seeds_of_saved_runs_stay():
    assert derive_seed("augment", 0, 1, "a/b") == 5763088635497676163
    assert derive_seed("latent noise", 3, 0, 7) == 2705936707740876898
    assert digest(1, "ab") == 17605244226592043528


@pytest.mark.parametrize("seed", REFUSED, ids=lambda seed: type(seed).__name__)
def test_anything_else_is_refused(seed):
    for draw in (
        lambda: whole_seed(seed),
        lambda: bootstrap_mean([1.0, 2.0], seed=seed),
        lambda: random_crop_flip(IMAGE, 8, seed=seed),
        lambda: TinyTransformer((4, 2, 2), seed=seed),
        lambda: keyed_normal((2, 3), seed, 1, 0),
        lambda: StreamLoader(DataOptions(shards="http://127.0.0.1:9/{0..1}.tar"), 1, seed),
    ):
        with pytest.raises(RecipeError, match=r"seed is .*, expected a whole number"):
            draw()


def test_a_generator_is_refused_with_what_to_do():
    with pytest.raises(
        RecipeError, match=r"torch.* expected a whole number; give an int such as its initial_seed\(\)"
    ):
        whole_seed(torch.Generator())  # pyright: ignore[reportArgumentType]


def test_every_verb_with_a_seed_refuses_a_fraction(make_shards, make_png, tmp_path):
    """The verbs are found by their signatures, so that a new one is tried too."""
    data = make_shards(tmp_path / "shards", [3])
    (tmp_path / "a.png").write_bytes(make_png())
    given = {
        "shards": data,
        "inputs": [tmp_path / "a.png"],
        "normal": [tmp_path / "a.png"],
        "out": tmp_path / "out.png",
        "path": tmp_path,
    }
    tried = set()
    for name in latentae.__all__:
        function = getattr(latentae, name)
        if not inspect.isfunction(function) or "seed" not in inspect.signature(function).parameters:
            continue
        needed = [
            p for p in inspect.signature(function).parameters.values() if p.default is inspect.Parameter.empty
        ]
        arguments = [given.get(parameter.name, tmp_path / "none") for parameter in needed]
        with pytest.raises(RecipeError, match=r"seed is 3\.5, expected a whole number"):
            function(*arguments, seed=3.5)
        tried.add(name)
    assert tried >= {"order", "evaluate", "denoise", "anomaly", "sample", "quickstart"}


def test_loaders_take_equal_seeds_alike(make_shards, tmp_path):
    data = make_shards(tmp_path / "shards", [6])
    seeds: list[Any] = [3, np.int64(3), torch.tensor(3)]
    listed = [list(order(data, seed=seed, global_batch=2)) for seed in seeds]
    assert listed[0] == listed[1] == listed[2]
    options = DataOptions(shards=str(data), validation="none", resolution=8)
    batches = [next(iter(TrainLoader(options, 2, seed))) for seed in seeds]
    assert batches[0].keys == batches[1].keys
    assert torch.equal(batches[0].images, batches[1].images)
    with pytest.raises(RecipeError, match=r"seed is 3\.0"):
        TrainLoader(options, 2, 3.0)  # pyright: ignore[reportArgumentType]


def test_the_example_draws_by_the_number():
    class Model(torch.nn.Module):
        channels = 2

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, t, labels):
            return x * self.weight

    labels = torch.zeros(2, dtype=torch.long)
    drawn = [diffuse(Model(), labels, (2, 2), steps=2, seed=seed) for seed in (3, np.int64(3))]  # pyright: ignore[reportArgumentType]
    assert torch.equal(*drawn)
