"""Recipes: TOML in, validated strictly, printed resolved."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from latentae.data.options import DataOptions
from latentae.errors import RecipeError
from latentae.losses.options import LossOptions
from latentae.models.config import AutoencoderKLConfig, preset
from latentae.training.options import EmaOptions, LogOptions, ModelOptions, OptimizerOptions

__all__ = ["Recipe", "config", "load_recipe", "recipe_options", "shipped_recipes"]


class Recipe(BaseModel):
    """Everything that decides what a run does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field(default="", description="One sentence for people.")
    images: int = Field(default=10_000_000, ge=1, description="Images to see in all.")
    batch_size: int = Field(default=16, ge=1, description="Images per optimizer step, over all processes and accumulation steps.")
    gradient_accumulation: int = Field(default=1, ge=1, description="Parts each process cuts its share of a batch into.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Compute type; auto is bf16 on a GPU that has it, else fp32."
    )
    seed: int = Field(default=0, ge=0, description="Seed of weights, data order, augmentation and posterior noise.")
    checkpoint_every_images: int = Field(
        default=100_000, ge=1, description="Images between checkpoints; the last state is always saved."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept.")
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    ema: EmaOptions = EmaOptions()
    log: LogOptions = LogOptions()

    def autoencoder_config(self) -> AutoencoderKLConfig:
        """The shape of the model; its sample_size is the training resolution."""
        replaced = self.model.model_dump(exclude={"preset", "initialization", "initial_logvar"}, exclude_none=True)
        return preset(self.model.preset, sample_size=self.data.resolution, **replaced)

    def identity(self) -> dict[str, Any]:
        """The values that decide the weights: what two runs must share to be the same job."""
        values = self.model_dump(mode="json", exclude={"description", "checkpoint_every_images", "keep_checkpoints", "log"})
        for name in ("workers", "index", "cache_mb", "max_bad_share", "max_bad_in_a_row"):
            values["data"].pop(name, None)
        return values

    def toml(self) -> str:
        """The resolved recipe as TOML; options that are not set are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in files("latentae").joinpath("recipes").iterdir()
        if entry.name.endswith(".toml")
    )


def load_recipe(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a TOML file, and replace single values.

    Args:
        recipe: a shipped name, a path that ends in .toml, or a Recipe.
        overrides: dotted keys or nested mappings to values; strings are read as TOML values where the option is not a text.

    Raises:
        RecipeError: no such recipe, an unknown key (the nearest is named) or a value that is not allowed.
    """
    values, name = _read(recipe)
    for key, value in _flatten(overrides or {}):
        _replace(values, key, value, name)
    try:
        result = Recipe(**values)
        result.autoencoder_config()
    except ValidationError as error:
        raise RecipeError(_explain(name, error)) from error
    return result


def _read(recipe: str | Path | Recipe) -> tuple[dict[str, Any], str]:
    if isinstance(recipe, Recipe):
        return recipe.model_dump(mode="json"), "recipe"
    shipped = shipped_recipes()
    if str(recipe) in shipped:
        text = files("latentae").joinpath("recipes", f"{recipe}.toml").read_text(encoding="utf-8")
    elif str(recipe).endswith(".toml"):
        try:
            text = Path(recipe).read_text(encoding="utf-8")
        except OSError as error:
            raise RecipeError(f"could not read recipe {recipe}: {error.strerror}") from error
    else:
        near = difflib.get_close_matches(str(recipe), shipped, 1)
        hint = f"did you mean {near[0]}?" if near else f"the shipped ones are {', '.join(shipped)}"
        raise RecipeError(f"unknown recipe {recipe!r}; {hint} A recipe of your own is a path that ends in .toml")
    try:
        return tomllib.loads(text), f"recipe {recipe}"
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"recipe {recipe} is not TOML: {error}") from error


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}".replace("-", "_")
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{name}.")
        elif value is not None:
            yield name, value


def _replace(values: dict[str, Any], key: str, value: Any, name: str) -> None:
    if key not in recipe_options():
        raise RecipeError(f"{name}: unknown option {key}; {_nearest(key)}")
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = _parse(value, recipe_options()[key])


def _parse(value: Any, field: FieldInfo) -> Any:
    """Text from a command line becomes a TOML value, unless the option takes text."""
    if isinstance(value, Path):
        return str(value)
    takes_text = str in (field.annotation, *get_args(field.annotation)) or get_origin(field.annotation) is Literal
    if not isinstance(value, str) or takes_text:
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


def _nearest(key: str) -> str:
    names = list(recipe_options())
    near = difflib.get_close_matches(key, names, 1, cutoff=0.5)
    near = near or [name for name in names if name.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return f"did you mean {near[0]}?" if near else "run `latentae train --help` for the list"


def _explain(name: str, error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown key {key}; {_nearest(key)}"
    return f"{name}: {key} is {first['input']!r}: {first['msg'][0].lower() + first['msg'][1:]}"


@cache
def recipe_options() -> dict[str, FieldInfo]:
    """Dotted name of every option -> its field (description, default, type)."""
    return dict(_options(Recipe, ""))


def _options(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _options(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def config(recipe: str | Path, **overrides: Any) -> str:
    """The resolved recipe as TOML text; a nested option is a nested mapping, `config("kl-f8", optimizer={"lr": 2e-4})`.

    Raises:
        RecipeError: see `load_recipe`.
    """
    return load_recipe(recipe, overrides).toml()
