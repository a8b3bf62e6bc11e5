"""Recipes: strictly validated options of a training run, read from TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ValidationError, model_validator
from pydantic.fields import FieldInfo

from latentae.data.options import DataOptions
from latentae.errors import RecipeError
from latentae.keyed import MAX_SEED
from latentae.losses.options import LossOptions
from latentae.models.config import AutoencoderConfig, AutoencoderDCConfig
from latentae.models.presets import LINEAR, preset, preset_kind
from latentae.options import RecipeTable, explain, nearest, option
from latentae.training.options import (
    CorruptionOptions,
    EmaOptions,
    FailureOptions,
    LogOptions,
    ModelOptions,
    OptimizerOptions,
)

__all__ = ["Recipe", "load_recipe", "recipe_options", "shipped_recipes"]

# Keys that a phase may replace; other keys, above all the model's shape, hold for the complete run.
_PHASE_TABLES = ("model", "data", "corruption", "loss", "optimizer", "ema")
_PHASE_KEYS = ("name", "images", "batch_size", "gradient_accumulation", *_PHASE_TABLES)
_PHASE_PATH = ("latent_noise", "latent_mask", "decoder_noise", "nested_channels")
_PHASE_MODEL_KEYS = ("train", "gradient_checkpointing", *_PHASE_PATH)
_OF_LINEAR = ("patch", "tied")
_SHAPE = {
    "in_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    *_OF_LINEAR,
}
# Options that may change when a run resumes: the weights do not depend on them, except by rounding.
_OF_CHECKPOINTS = ("checkpoint_every_images", "keep_checkpoints", "checkpoint_url")
_NOT_IDENTITY = {"description", "compile", "gradient_accumulation", "failure", "log", *_OF_CHECKPOINTS}
_LIMITS = ("max_pixels", "max_bad_share", "max_bad_in_a_row")
_NOT_IDENTITY_OF_DATA = ("shards", "workers", "index", "cache_mb", *_LIMITS)


class Recipe(RecipeTable):
    """All options of a training run."""

    description: str = option("One sentence for people.", default="")
    images: int = option("Images to see in all; with phases, the sum of theirs.", default=10_000_000, ge=1)
    batch_size: int = option(
        "Images per optimizer step, over all processes and accumulation steps.", default=16, ge=1
    )
    gradient_accumulation: int = option(
        "Accumulation steps: parts of each process's share of a batch.", default=1, ge=1
    )
    precision: Literal["auto", "fp32", "bf16"] = option(
        "Compute type; auto is bf16 on a GPU that supports it, else fp32.", default="auto"
    )
    compile: bool = option(
        "torch.compile encoder, decoder and discriminator; R1 and R2 need eager mode.", default=False
    )
    seed: int = option(
        "Seed of weights, data order, augmentation and posterior noise.", default=0, ge=0, le=MAX_SEED
    )
    checkpoint_every_images: int = option(
        "Images between checkpoints; the last state is always saved.", default=100_000, ge=1
    )
    keep_checkpoints: int = option("Newest checkpoints to keep.", default=2, ge=1)
    checkpoint_url: str | None = option(
        "Also copy every checkpoint to this fsspec URL, such as s3://bucket/run, and resume from there.",
        default=None,
    )
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    corruption: CorruptionOptions = CorruptionOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    ema: EmaOptions = EmaOptions()
    log: LogOptions = LogOptions()
    failure: FailureOptions = FailureOptions()
    phases: tuple[dict[str, Any], ...] = option(
        "One table per phase with its images and what it replaces; phases run in order on the same weights.",
        default=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _images_of_phases(cls, values: Any) -> Any:
        phases = values.get("phases") if isinstance(values, dict) else None
        if not phases:
            return values
        for index, phase in enumerate(phases):
            _check_phase(f"phases.{index}", phase)
        images = sum(phase["images"] for phase in phases)
        if values.get("images", images) != images:
            raise ValueError(
                f"images is {values['images']}, but the phases see {images}; set phases.N.images"
            )
        return {**values, "images": images}

    @model_validator(mode="before")
    @classmethod
    def _no_kl_of_a_code(cls, values: Any) -> Any:
        """Without a posterior the default weight of the KL is 0.

        A linear autoencoder never has one.
        """
        tables = (values.get("model", {}), values.get("loss", {})) if isinstance(values, dict) else ()
        if not tables or not all(isinstance(table, dict) for table in tables):
            return values
        model, loss = tables
        if model.get("bottleneck") != "deterministic" and model.get("preset") != LINEAR:
            return values
        return {**values, "loss": {"kl": 0.0, **loss}, "model": {"bottleneck": "deterministic", **model}}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.phases:
            self.phase_recipes()  # which are validated one by one
            return self
        model, loss = self.model, self.loss
        if model.bottleneck == "deterministic" and (loss.kl or model.initial_logvar):
            raise ValueError(
                f"loss.kl is {loss.kl:g} and model.initial_logvar {model.initial_logvar:g}, "
                "but model.bottleneck is 'deterministic' and has no posterior; "
                "set both to 0, or choose 'gaussian'"
            )
        of = None if model.preset == "init" else preset_kind(model.preset)
        if model.initialization == "pca" and model.init_from is None and of is not AutoencoderDCConfig:
            raise ValueError(
                f"model.initialization is 'pca', but model.preset is {model.preset!r} and only an "
                "AutoencoderDC can start there; use a dc- preset, or initialization = 'linear'"
            )
        if model.preset == LINEAR:
            for name, wrong in self._beyond_linear().items():
                if wrong:
                    found = f"model.preset is 'linear', which has no {name}"
                    raise ValueError(f"{found}; remove it, or use another preset")
        if self.compile and (loss.adversarial.r1 or loss.adversarial.r2):
            raise ValueError(
                "loss.adversarial.r1 and r2 differentiate twice, which torch.compile can't; "
                "set compile = false"
            )
        if loss.contractive.weight and (self.compile or model.gradient_checkpointing):
            raise ValueError(
                "loss.contractive differentiates twice, which torch.compile and gradient checkpointing "
                "can't; set compile and model.gradient_checkpointing to false"
            )
        if model.train not in ("all", "encoder", "latent") and loss.alignment.weight:
            raise ValueError(
                f"loss.alignment moves the encoder, but model.train is {model.train!r}; remove one of them"
            )
        return self

    def _beyond_linear(self) -> dict[str, bool]:
        """Options that a linear autoencoder lacks, because it has no levels and no activation."""
        game, alignment = self.loss.adversarial, self.loss.alignment
        return {
            "model.bottleneck = 'gaussian'": self.model.bottleneck == "gaussian",
            f"model.train = {self.model.train!r}": self.model.train != "all",
            "hidden layers for optimizer.name = 'muon'": self.optimizer.name == "muon",
            "an adaptive adversarial weight": game.weight > 0 and game.adaptive,
            "an adaptive alignment weight": alignment.weight > 0 and alignment.adaptive,
        }

    def phase_recipes(self) -> tuple[Recipe, ...]:
        """The recipe of each phase, with its own `images`, and its name as description.

        Without phases, this recipe.
        """
        if not self.phases:
            return (self,)
        base = self.model_dump(mode="json", exclude={"phases"})
        return tuple(self._phase(base, index, phase) for index, phase in enumerate(self.phases))

    @staticmethod
    def _phase(base: dict[str, Any], index: int, phase: dict[str, Any]) -> Recipe:
        values = _merged(base, {key: value for key, value in phase.items() if key != "name"})
        # another seed, so that order and crops of the data do not repeat
        values |= {"description": phase.get("name", f"phase {index + 1}"), "seed": base["seed"] + index}
        try:
            return Recipe(**values)
        except ValidationError as error:
            raise ValueError(f"phases.{index}: {_explain(error)}") from error

    def autoencoder_config(self) -> AutoencoderConfig:
        """The shape of the model.

        Its sample_size is the training resolution, or that of `model.init_from`.

        Raises:
            RecipeError: preset is 'init', but `model.init_from` is not set.
            ModelError: unknown preset, or a model that can't be read.
        """
        model = self.model
        replaced = model.model_dump(include=_SHAPE, exclude_none=True)
        if model.preset == "init":
            if model.init_from is None:
                raise RecipeError("model.preset is 'init', but init_from is missing; give --init-from MODEL")
            config = _initial_config(str(model.init_from))
            if isinstance(config, AutoencoderDCConfig):
                replaced["bottleneck"] = model.bottleneck
            return config.model_copy(update=replaced)
        if preset_kind(model.preset) is AutoencoderDCConfig:
            replaced["bottleneck"] = model.bottleneck
        return preset(model.preset, sample_size=self.data.resolution, **replaced)

    def identity(self) -> dict[str, Any]:
        """The values that decide the weights; two runs with the same values are the same job.

        Paths of data and initial weights are not part of it: the job also has their digests.
        """
        values = self.model_dump(mode="json", exclude=_NOT_IDENTITY)
        for table in (values, *values["phases"]):
            table.get("model", {}).pop("gradient_checkpointing", None)
            table.pop("gradient_accumulation", None)
            data = table.get("data", {})
            for name in _NOT_IDENTITY_OF_DATA:
                data.pop(name, None)
            if data.get("validation", "auto") not in ("auto", "none"):
                data["validation"] = "none"  # separate shards take nothing from the training data
        values["model"].pop("init_from")
        return values

    def toml(self) -> str:
        """The resolved recipe as TOML, without options that are not set."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _check_phase(where: str, phase: Any) -> None:
    if not isinstance(phase, dict):
        raise ValueError(f"{where} is {phase!r}, expected a table")
    for path, keys, allowed in (
        (where, phase, _PHASE_KEYS),
        (f"{where}.model", phase.get("model", {}), _PHASE_MODEL_KEYS),
    ):
        for key in keys:
            if key not in allowed:
                advice = f"a phase may set {', '.join(allowed)}"
                raise ValueError(f"{path}.{key} can't differ between phases; {advice}")
    if not isinstance(phase.get("images"), int) or phase["images"] < 1:
        raise ValueError(f"{where}.images is {phase.get('images')!r}, expected the number of images to see")


def _merged(base: Any, changes: Any) -> Any:
    """Nested tables with the changed values."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: _merged(base.get(key), value) for key, value in changes.items()}


@cache
def _initial_config(path: str) -> AutoencoderConfig:
    from latentae.models.initialization import load_initial

    return load_initial(path).config


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    names = (entry.name for entry in files("latentae").joinpath("recipes").iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(recipe: str | Path | Recipe, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read a shipped recipe or a TOML file, and replace single values.

    Args:
        recipe: a shipped name, a path that ends in .toml, or a Recipe.
        overrides: dotted keys or nested mappings to values; text is parsed as a TOML value unless
            the option is text.

    Raises:
        RecipeError: no such recipe, an unknown key (the nearest is named) or a value that is not
            allowed.
    """
    values, name = _read(recipe)
    for key, value in _flatten(overrides or {}):
        _replace(values, key, value, name)
    try:
        result = Recipe(**values)
    except ValidationError as error:
        raise RecipeError(f"{name}: {_explain(error)}") from error
    if result.model.preset != "init":
        result.autoencoder_config()
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
        hint = nearest(str(recipe), shipped, f"the shipped ones are {', '.join(shipped)}.")
        raise RecipeError(f"unknown recipe {recipe!r}; {hint} The path of your own recipe must end in .toml")
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
    of_phase = re.fullmatch(r"phases\.(\d+)\.(.+)", key)
    if of_phase:
        number, key, phases = int(of_phase[1]), of_phase[2], values.get("phases", ())
        if number >= len(phases):
            raise RecipeError(f"{name}: there is no phase {number}; it has {len(phases)}, counted from 0")
        values.pop("images", None)  # the sum over phases, which may change now
        values = phases[number]
    known = recipe_options()
    if key not in known:
        raise RecipeError(f"{name}: unknown option {key}; {nearest(key, list(known), _LIST)}")
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
    values[last] = _parse(value, known[key])


def _parse(value: Any, field: FieldInfo) -> Any:
    """Text from a command line as a TOML value, unless the option takes text."""
    if isinstance(value, Path):
        return str(value)
    choices = get_args(field.annotation)
    of_texts = get_origin(field.annotation) is Literal and isinstance(choices[0], str)
    if not isinstance(value, str) or of_texts or str in (field.annotation, *choices):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value


_LIST = "run `latentae train --help` for the list"


def _explain(error: ValidationError) -> str:
    return explain(error, recipe_options(), list(recipe_options()), _LIST)


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
