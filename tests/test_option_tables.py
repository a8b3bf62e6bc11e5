"""Option tables: checks, messages, job identity, and the command line that follows from them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import latentae
from latentae import cli
from latentae.errors import RecipeError
from latentae.keyed import MAX_SEED, AnySeed, Seed
from latentae.options import (
    KW_ONLY,
    OVERRIDES,
    Device,
    argument,
    help_of,
    identity,
    is_positional,
    nearest,
    option,
    parse,
    recipe_verb,
    table,
    table_fields,
    verb,
)

PACKAGES = {name: package for package, names in latentae.VERBS.values() for name in names}


@table
class Base:
    _: KW_ONLY
    size: int = option("Side.", default=8, ge=1, le=64, identity=True)
    max_pixels: int = option("Limit.", default=100, ge=1, identity="changed")


@table
class Options(Base):
    """Do something. With more."""

    model: str = argument("A model.")
    out: str = argument("A folder.", default="out")
    _: KW_ONLY
    share: float = option("Share.", default=0.5, gt=0, lt=1)
    scale: float | None = option("Scale.", default=None, gt=0, allow_inf_nan=False)
    sides: int | Sequence[int] | None = option("Sides.", default=None, many=True)
    mode: Literal["mean", "sample"] | None = option("Mode.", default=None)
    name: str | None = option("Name.", default=None, metavar="OWNER/NAME", pattern="^[a-z]+/[a-z]+$")
    flip: bool = option("Flip.", default=True)
    device: Device = option("Device.", default="auto")
    seed: Seed = option("Seed.", default=0, identity=True)
    any_seed: AnySeed = option("Seed.", default=0)


@verb(Options)
def work(options: Options) -> Options:
    """Return the options."""
    return options


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shere": 1}, r"unknown option shere; did you mean share\?"),
        ({"zzz": 1}, "unknown option zzz; the options are model, out, share, .*size, max_pixels"),
        ({"size": 0}, "size is 0, expected 1 to 64"),
        ({"size": 1.5}, "size is 1.5, expected a whole number"),
        ({"size": "x"}, "size is 'x', expected a whole number"),
        ({"max_pixels": 0}, "max_pixels is 0, expected 1 or more"),
        ({"share": 1.0}, "share is 1.0, expected above 0 and below 1"),
        ({"scale": 0}, "scale is 0, expected above 0"),
        ({"scale": float("inf")}, "scale is inf, expected a finite number"),
        ({"scale": "wide"}, "scale is 'wide', expected a number"),
        ({"sides": "x"}, "sides is 'x', expected a whole number"),
        ({"mode": "mode"}, "mode is 'mode', expected one of mean, sample"),
        ({"name": "a b"}, "name is 'a b', expected OWNER/NAME"),
        ({"name": 3}, "name is 3, expected text"),
        ({"flip": "maybe"}, "flip is 'maybe', expected true or false"),
        ({"seed": -1}, "seed is -1, expected a whole number from 0"),
        ({"seed": 3.0}, "seed is 3.0, expected a whole number"),
    ],
)
def test_a_wrong_value_is_one_line(wrong, message):
    with pytest.raises(RecipeError, match=f"^{message}") as caught:
        work("m", **wrong)
    assert "\n" not in str(caught.value)


def test_missing_and_surplus_arguments():
    with pytest.raises(RecipeError, match=r"^model is missing: A model\.$"):
        work()
    with pytest.raises(TypeError, match="got 3 positional arguments, expected at most 2: model, out"):
        work("m", "o", 3)  # pyright: ignore[reportCallIssue]


@given(st.integers())
def test_a_number_is_taken_exactly_in_its_range(value):
    if 1 <= value <= 64:
        assert work("m", size=value).size == value
    else:
        with pytest.raises(RecipeError, match="expected 1 to 64"):
            work("m", size=value)


@given(st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, MAX_SEED), st.integers())
def test_text_is_the_value_it_spells(share, seed, any_seed):
    """The command line gives text."""
    options = work("m", share=share, seed=seed, any_seed=any_seed)
    text: dict[str, Any] = {"share": repr(share), "seed": str(seed), "any_seed": str(any_seed)}
    assert work("m", **text) == options
    assert (options.share, options.seed, options.any_seed) == (share, seed, any_seed)


def test_numbers_of_other_libraries_are_taken():
    options = work(
        "m",
        size=np.int64(3),
        share=np.float32(0.25),
        sides=[np.int64(8), 16],
        seed=np.uint8(7),
        any_seed=torch.tensor(-5),
        device=torch.device("cpu"),
    )
    assert (options.size, options.share, list(options.sides)) == (3, 0.25, [8, 16])
    assert (options.seed, options.any_seed, options.device) == (7, -5, "cpu")
    assert list(work("m", sides=np.array([8, 16])).sides) == [8, 16]


@given(st.sampled_from(sorted(set(PACKAGES))), st.data())
def test_a_typo_is_advised(name, data):
    position = data.draw(st.integers(0, len(name) - 1))
    near = nearest(name[:position] + name[position + 1 :], sorted(PACKAGES), "no")
    assert near.removeprefix("did you mean ").removesuffix("?") in PACKAGES


def test_identity_has_what_identifies_a_job():
    assert identity(work("m")) == {"seed": 0, "size": 8}
    assert identity(work("m", max_pixels=7, size=9, share=0.1)) == {"seed": 0, "size": 9, "max_pixels": 7}


def test_other_keywords_of_a_recipe_verb_are_overrides():
    @table
    class Recipe:
        recipe: str = argument("A recipe.")
        _: KW_ONLY
        output: str = option("A folder.", default="runs")
        overrides: dict[str, Any] = option("Options of the recipe.", default={})

    @recipe_verb(Recipe)
    def train(options: Recipe) -> Recipe:
        """Train."""
        return options

    assert train("a", lr=1, output="x") == Recipe("a", output="x", overrides={"lr": 1})


def test_a_function_has_the_signature_and_texts_of_its_table():
    signature = inspect.signature(work)
    assert set(signature.parameters) == set(table_fields(Options))
    assert list(signature.parameters)[:2] == ["model", "out"]
    assert signature.parameters["share"].default == 0.5
    assert signature.parameters["share"].kind is inspect.Parameter.KEYWORD_ONLY
    assert work.__doc__.startswith("Return the options.")
    for name, field in table_fields(Options).items():
        assert f"    {name}: {field.description}" in work.__doc__


def test_a_new_field_needs_no_further_code(monkeypatch):
    module = importlib.import_module("latentae.data.options")
    assert latentae.shards  # loaded with its own table

    @table
    class Wider(module.ShardsOptions):
        """Pack images."""

        _: KW_ONLY
        new_option: int = option("A new option.", default=17)

    monkeypatch.setattr(module, "ShardsOptions", Wider)
    assert re.search(r"--new-option N +A new option\. \[17\]", _help("shards"))
    given: dict[str, Any] = {}
    monkeypatch.setattr(latentae, "shards", lambda **options: given.update(options), raising=False)
    assert CliRunner().invoke(cli.app, ["shards", "a", "b", "--new-option", "5"]).exit_code == 0
    assert parse(Wider, **given).new_option == 5
    assert inspect.signature(verb(Wider)(lambda options: None)).parameters["new_option"].default == 17


def _table(name: str) -> type[Any]:
    module = importlib.import_module(f"latentae.{PACKAGES[name]}.options")
    return getattr(module, f"{name.capitalize()}Options")


def _help(*words: str, columns: int = 80) -> str:
    result = CliRunner().invoke(cli.app, [*words, "--help"], terminal_width=columns)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("name", PACKAGES)
def test_the_command_line_has_the_defaults_of_the_function(name, monkeypatch):
    """A command with only its required arguments is the function's call with them."""
    options = _table(name)
    fields = table_fields(options)
    words = [field for field in fields if is_positional(options, field) and fields[field].is_required()]
    required = [field for field in fields if fields[field].is_required()]
    line = [name, *words]
    for field in set(required) - set(words):
        line += [f"--{field}", field]
    called: list[Any] = []
    monkeypatch.setattr(latentae, name, lambda *a, **k: called.append(parse(options, *a, **k)), raising=False)
    monkeypatch.setattr(cli, "_PRINTERS", {})
    result = CliRunner().invoke(cli.app, line)
    assert result.exit_code == 0, result.output
    values = {field: (field,) if help_of(fields[field], "many") else field for field in required}
    assert called == [parse(options, **values)]


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("columns", [60, 80, 100])
def test_help_has_every_option_with_its_full_text(name, columns):
    shown = "".join(_help(name, columns=columns).split())
    for field, info in table_fields(_table(name)).items():
        assert field == OVERRIDES or "".join(info.description.split()) in shown, field


@pytest.mark.parametrize("columns", [80, 100])
def test_the_list_of_commands_has_one_full_line_each(columns):
    lines = _help(columns=columns).splitlines()
    for name in PACKAGES:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert line.endswith("."), line
        first = line.removeprefix(f"  {name}").strip()
        assert " ".join(_table(name).__doc__.split()).startswith(first)
