"""Recipes of several phases, and what a recipe amounts to."""

from __future__ import annotations

import tomllib

import pytest

from latentae.errors import RecipeError
from latentae.training.config import config, describe_phases
from latentae.training.recipe import Recipe, load_recipe

TWO = """
batch_size = 8
[data]
resolution = 32
[[phases]]
name = "small"
images = 100
[[phases]]
images = 50
batch_size = 4
data.resolution = 64
model.train = "decoder"
loss.adversarial.weight = 0.5
loss.adversarial.start_images = 20
"""


@pytest.fixture
def two(tmp_path):
    file = tmp_path / "two.toml"
    file.write_text(TWO)
    return file


def test_each_phase_is_the_recipe_with_its_own_values(two):
    recipe = load_recipe(two)
    assert recipe.images == 150
    first, second = recipe.phase_recipes()
    assert (first.images, first.batch_size, first.data.resolution, first.model.train) == (100, 8, 32, "all")
    assert (second.images, second.batch_size, second.data.resolution, second.model.train) == (
        50,
        4,
        64,
        "decoder",
    )
    assert (first.description, second.description) == ("small", "phase 2")
    assert first.seed != second.seed, "the same crops in the same order would come again"
    assert first.loss.adversarial.weight == 0
    alone = load_recipe("tiny-cpu")
    assert alone.phase_recipes() == (alone,), "a recipe without phases is its own phase"
    assert second.loss.adversarial.weight == 0.5


def test_an_option_of_one_phase_can_be_replaced(two):
    recipe = load_recipe(two, {"phases.1.images": "70", "phases.0.optimizer.lr": "2e-3", "loss.l1": "3"})
    assert recipe.images == 170
    first, second = recipe.phase_recipes()
    assert (first.optimizer.lr, second.images) == (2e-3, 70)
    assert first.loss.l1 == second.loss.l1 == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"images": 10}, "images is 10, but the phases see 150"),
        ({"phases.2.images": 10}, "there is no phase 2; it has 2, counted from 0"),
        ({"phases.0.optimizer.lrr": 1}, "did you mean optimizer.lr?"),
        ({"phases": [{"images": 5, "sed": 1}]}, "phases.0.sed can't differ between phases"),
        (
            {"phases": [{"images": 5, "model": {"preset": "kl-f4"}}]},
            "phases.0.model.preset can't differ between phases",
        ),
        ({"phases": [{"name": "x"}]}, "phases.0.images is None, expected the number of images to see"),
        (
            {"phases": [{"images": 5, "loss": {"l3": 1}}]},
            "phases.0: unknown option loss.l3; did you mean loss.l",
        ),
        ({"phases": [{"images": 5, "batch_size": 0}]}, "phases.0: batch_size is 0"),
        ({"phases": [3]}, "phases.0 is 3, expected a table"),
        ({"phases.0.loss.alignment.weight": 0.1, "phases.0.model.train": "decoder"}, "moves the encoder"),
        ({"compile": True, "phases.1.loss.adversarial.r1": 1.0}, "set compile = false"),
    ],
)
def test_what_can_not_be_is_one_line_that_helps(overrides, message, two):
    with pytest.raises(RecipeError) as caught:
        load_recipe(two, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_shape_of_given_weights_needs_them():
    recipe = load_recipe("sd-vae-ft-mse")
    with pytest.raises(RecipeError, match="--init-from"):
        recipe.autoencoder_config()


def test_identity_leaves_out_what_does_not_decide_the_weights(two):
    base = load_recipe(two)
    same = {
        "compile": True,
        "gradient_accumulation": 2,
        "model.gradient_checkpointing": True,
        "failure.max_rollbacks": 9,
    }
    same |= {
        "checkpoint_url": "memory://x",
        "data.workers": 3,
        "log.wandb": "project",
        "log.validation_images": 3,
    }
    same |= {"checkpoint_every_images": 7}
    assert load_recipe(two, same).identity() == base.identity()
    for other in ({"seed": 1}, {"phases.1.images": 51}, {"loss.l1": 2}, {"model.latent_noise": 1.0}):
        assert load_recipe(two, other).identity() != base.identity(), other


def test_config_says_what_each_phase_amounts_to(two):
    text = config(two, optimizer={"lr": 0.5})
    assert Recipe(**tomllib.loads(text)) == load_recipe(two, {"optimizer.lr": 0.5})
    head = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    assert head == describe_phases(load_recipe(two, {"optimizer.lr": 0.5}))
    said = "\n".join(head)
    assert 'phase 0 "small": 100 images = 13 steps of 8, 32 px' in said
    assert 'phase 1 "phase 2": 50 images = 13 steps of 4, 64 px' in said
    assert "trained: decoder (the latent is unchanged)" in said
    assert "weights per image element: l1 1, LPIPS (vgg) 1, kl 1e-06, adversarial (hinge, patch) 0.5" in said
    assert "discriminator: from image 20 on, so it sees 30 images" in said
