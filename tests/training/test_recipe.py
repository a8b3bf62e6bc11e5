from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.errors import LatentAEError, RecipeError
from latentae.training.config import config
from latentae.training.recipe import load_recipe, recipe_options, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_is_valid_and_prints_itself(name, tmp_path):
    recipe = load_recipe(name)
    assert recipe.description
    file = tmp_path / "again.toml"
    file.write_text(config(name))
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.lrr": 1}, "did you mean optimizer.lr?"),
        ({"bach_size": 1}, "did you mean batch_size?"),
        ({"lr": 1}, "did you mean optimizer.lr?"),
        ({"optimizer": {"l-r": 1}}, "did you mean optimizer.lr?"),
        ({"batch_size": "many"}, "batch_size is 'many'"),
        ({"batch_size": 0}, "batch_size is 0, expected 1 or more"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"model.preset": "kl-f9"}, "kl-f4, kl-f8"),
        ({"model.block_out_channels": [10, 20, 30], "model.norm_num_groups": 4}, "norm_num_groups 4"),
    ],
)
def test_a_bad_option_is_one_line_that_helps(overrides, message):
    with pytest.raises(LatentAEError) as caught:
        load_recipe("tiny-cpu", overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("[optimizer]\nwarm_up_images = 3\n")
    with pytest.raises(RecipeError, match=r"did you mean optimizer\.warmup_images\?"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tinycpu", "did you mean tiny-cpu"),
        ("zzz", "shipped ones are"),
        ("none.toml", "could not read"),
        ("bad.toml", "not TOML"),
    ],
)
def test_a_recipe_that_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("a = ")
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


def test_options_come_as_text_nested_or_dotted_with_dash_or_underscore():
    a = load_recipe(
        "tiny-cpu",
        {
            "optimizer.lr": "2e-4",
            "batch-size": "8",
            "model.block_out_channels": "[16, 32, 64]",
            "data.flip": "false",
        },
    )
    b = load_recipe(
        "tiny-cpu",
        {
            "optimizer": {"lr": 2e-4},
            "batch_size": 8,
            "model": {"block_out_channels": (16, 32, 64)},
            "data": {"flip": False},
        },
    )
    assert a.optimizer.lr == 2e-4
    assert a.batch_size == 8
    assert a.model.block_out_channels == (16, 32, 64)
    assert a == b.model_copy()


@given(st.text(alphabet="0123456789abc./_-", min_size=1, max_size=12))
def test_a_path_stays_the_text_it_was(path):
    value = load_recipe("tiny-cpu", {"data.shards": path}).data.shards
    assert value == path


def test_every_option_has_a_sentence_that_explains_it():
    for name, field in recipe_options().items():
        assert field.description is not None, name
        assert field.description.endswith("."), name


def test_a_choice_between_numbers_can_be_typed():
    assert load_recipe("tiny-cpu", {"data.channels": "3"}).data.channels == 3
    with pytest.raises(RecipeError, match=r"data\.channels is 2"):
        load_recipe("tiny-cpu", {"data.channels": "2"})
