"""Recipes: TOML in, validated strictly, printed resolved."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from latentae.data.options import DataOptions
from latentae.errors import RecipeError
from latentae.keyed import MAX_SEED
from latentae.losses.options import LossOptions
from latentae.models.config import AutoencoderConfig, AutoencoderDCConfig
from latentae.models.presets import LINEAR, preset_config, preset_kind
from latentae.training.options import (
    CorruptionOptions,
    EmaOptions,
    FailureOptions,
    LogOptions,
    ModelOptions,
    OptimizerOptions,
)

__all__ = ["Recipe", "load_recipe", "recipe_options", "shipped_recipes"]

# What a phase may replace; the rest, above all the shape of the model, is that of the whole run.
_PHASE_KEYS = (
    "name",
    "images",
    "batch_size",
    "gradient_accumulation",
    "model",
    "data",
    "corruption",
    "loss",
    "optimizer",
    "ema",
)
_PHASE_MODEL_KEYS = (
    "train",
    "latent_noise",
    "latent_mask",
    "decoder_noise",
    "nested_channels",
    "gradient_checkpointing",
)
# Options of ModelOptions that are not keys of the autoencoder's config.
_NOT_SHAPE = {
    "preset",
    "initialization",
    "initial_logvar",
    "init_from",
    "init_discriminator",
    "train",
    "gradient_checkpointing",
    "latent_noise",
    "latent_mask",
    "decoder_noise",
    "nested_channels",
    "bottleneck",
}
# What may differ between two halves of one run: the weights do not depend on it, or by rounding only.
_NOT_IDENTITY = {
    "description",
    "checkpoint_every_images",
    "keep_checkpoints",
    "checkpoint_url",
    "compile",
    "gradient_accumulation",
    "failure",
    "log",
}
_NOT_IDENTITY_OF_DATA = (
    "shards",
    "workers",
    "index",
    "cache_mb",
    "max_pixels",
    "max_bad_share",
    "max_bad_in_a_row",
)


class Recipe(BaseModel):
    """Everything that decides what a run does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field(default="", description="One sentence for people.")
    images: int = Field(
        default=10_000_000, ge=1, description="Images to see in all; with phases, the sum of theirs."
    )
    batch_size: int = Field(
        default=16, ge=1, description="Images per optimizer step, over all processes and accumulation steps."
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Parts each process cuts its share of a batch into."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto", description="Compute type; auto is bf16 on a GPU that has it, else fp32."
    )
    compile: bool = Field(
        default=False, description="torch.compile encoder, decoder and discriminator; R1 and R2 need eager."
    )
    seed: int = Field(
        default=0,
        ge=0,
        le=MAX_SEED,
        description="Seed of weights, data order, augmentation and posterior noise.",
    )
    checkpoint_every_images: int = Field(
        default=100_000, ge=1, description="Images between checkpoints; the last state is always saved."
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest checkpoints kept.")
    checkpoint_url: str | None = Field(
        default=None,
        description="Copy every checkpoint there too, and go on from there: any fsspec URL, such as s3://bucket/run.",
    )
    model: ModelOptions = ModelOptions()
    data: DataOptions = DataOptions()
    corruption: CorruptionOptions = CorruptionOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    ema: EmaOptions = EmaOptions()
    log: LogOptions = LogOptions()
    failure: FailureOptions = FailureOptions()
    phases: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="Tables of what differs in each phase, with its images: one after the other on the same weights.",
    )

    @model_validator(mode="before")
    @classmethod
    def _images_of_phases(cls, values: Any) -> Any:
        phases = values.get("phases") if isinstance(values, dict) else None
        if not phases:
            return values
        for index, phase in enumerate(phases):
            _check_phase(index, phase)
        images = sum(phase["images"] for phase in phases)
        if values.get("images", images) != images:
            raise ValueError(
                f"images is {values['images']}, but the phases see {images}; set phases.N.images"
            )
        return {**values, "images": images}

    @model_validator(mode="before")
    @classmethod
    def _no_kl_of_a_code(cls, values: Any) -> Any:
        """Without a posterior there is no KL: its default weight is not asked for. A linear autoencoder never has one."""
        tables = (values.get("model", {}), values.get("loss", {})) if isinstance(values, dict) else ()
        if not tables or not all(isinstance(table, dict) for table in tables):
            return values
        model, loss = tables
        if model.get("bottleneck") != "deterministic" and model.get("preset") != LINEAR:
            return values
        return {**values, "loss": {"kl": 0.0, **loss}, "model": {"bottleneck": "deterministic", **model}}

    @model_validator(mode="after")
    def _no_posterior(self) -> Self:
        if self.model.bottleneck == "deterministic" and (self.loss.kl or self.model.initial_logvar):
            raise ValueError(
                f"loss.kl is {self.loss.kl:g} and model.initial_logvar {self.model.initial_logvar:g}, but model.bottleneck is "
                "'deterministic' and has no posterior; set both to 0, or make it 'gaussian'"
            )
        return self

    @model_validator(mode="after")
    def _pca(self) -> Self:
        kind = None if self.model.preset == "init" else preset_kind(self.model.preset)
        if (
            self.model.initialization == "pca"
            and self.model.init_from is None
            and kind is not AutoencoderDCConfig
        ):
            raise ValueError(
                f"model.initialization is 'pca', but only an AutoencoderDC can start there and model.preset is {self.model.preset!r}: the "
                "decoder of an AutoencoderKL can't draw a patch linearly; take a dc- preset, or initialization = 'linear'"
            )
        return self

    @model_validator(mode="after")
    def _linear(self) -> Self:
        """What a linear autoencoder, which has no levels and no last layer behind an activation, can't do."""
        if self.model.preset == LINEAR:
            for phase in self.phase_recipes():
                adversarial, alignment = phase.loss.adversarial, phase.loss.alignment
                for name, wrong in (
                    ("model.bottleneck = 'gaussian'", phase.model.bottleneck == "gaussian"),
                    (f"model.train = {phase.model.train!r}", phase.model.train != "all"),
                    ("hidden layers for optimizer.name = 'muon'", phase.optimizer.name == "muon"),
                    ("an adaptive adversarial weight", adversarial.weight > 0 and adversarial.adaptive),
                    ("an adaptive alignment weight", alignment.weight > 0 and alignment.adaptive),
                ):
                    if wrong:
                        raise ValueError(
                            f"model.preset is 'linear', which has no {name}; leave it out, or choose another preset"
                        )
        return self

    @model_validator(mode="after")
    def _eager_penalties(self) -> Self:
        phases = self.phase_recipes()
        if self.compile and any(phase.loss.adversarial.r1 or phase.loss.adversarial.r2 for phase in phases):
            raise ValueError(
                "loss.adversarial.r1 and r2 differentiate twice, which torch.compile can't; set compile = false"
            )
        if any(
            phase.loss.contractive.weight and (self.compile or phase.model.gradient_checkpointing)
            for phase in phases
        ):
            raise ValueError(
                "loss.contractive differentiates twice, which torch.compile and gradient checkpointing can't; set compile and "
                "model.gradient_checkpointing to false"
            )
        for index, phase in enumerate(phases):
            if phase.model.train not in ("all", "encoder", "latent") and phase.loss.alignment.weight:
                where = f"phases.{index}." if self.phases else ""
                raise ValueError(
                    f"{where}loss.alignment moves the encoder, but model.train is {phase.model.train!r}; drop one"
                )
        return self

    def phase_recipes(self) -> tuple[Recipe, ...]:
        """The recipe of each phase, with `images` of its own and its name as description; without phases, this one."""
        if not self.phases:
            return (self,)
        base = self.model_dump(mode="json", exclude={"phases"})
        return tuple(self._phase(base, index, phase) for index, phase in enumerate(self.phases))

    @staticmethod
    def _phase(base: dict[str, Any], index: int, phase: dict[str, Any]) -> Recipe:
        values = _merged(base, {key: value for key, value in phase.items() if key != "name"})
        name = phase.get("name", f"phase {index + 1}")
        # another seed: the same data in the same order and with the same crops would come again
        try:
            return Recipe(**{**values, "description": name, "seed": base["seed"] + index})
        except ValidationError as error:
            raise ValueError(_explain(f"phases.{index}", error)) from error

    def autoencoder_config(self) -> AutoencoderConfig:
        """The shape of the model; its sample_size is the training resolution, unless the shape is that of `model.init_from`.

        Raises:
            RecipeError: the shape is that of `model.init_from`, which is not set.
            ModelError: no such preset, or a model that can't be read.
        """
        replaced = self.model.model_dump(exclude=_NOT_SHAPE, exclude_none=True)
        if self.model.preset == "init":
            if self.model.init_from is None:
                raise RecipeError(
                    "the model is to be that of --init-from, which is not given; name a run, a folder or a file"
                )
            config = _initial_config(str(self.model.init_from))
            if isinstance(config, AutoencoderDCConfig):
                replaced["bottleneck"] = self.model.bottleneck
            return config.model_copy(update=replaced)
        if preset_kind(self.model.preset) is AutoencoderDCConfig:
            replaced["bottleneck"] = self.model.bottleneck
        return preset_config(self.model.preset, sample_size=self.data.resolution, **replaced)

    def identity(self) -> dict[str, Any]:
        """The values that decide the weights: what two runs must share to be the same job.

        Where data and initial weights lie is no part of it: their digests belong to the job too.
        """
        values = self.model_dump(mode="json", exclude=_NOT_IDENTITY)
        for table in (values, *values["phases"]):
            table.get("model", {}).pop("gradient_checkpointing", None)
            table.pop("gradient_accumulation", None)
            data = table.get("data", {})
            for name in _NOT_IDENTITY_OF_DATA:
                data.pop(name, None)
            if data.get("validation", "auto") not in ("auto", "none"):
                data["validation"] = (
                    "none"  # shards of their own take nothing from the training data, wherever they lie
                )
        values["model"].pop("init_from")
        return values

    def toml(self) -> str:
        """The resolved recipe as TOML; options that are not set are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


def _check_phase(index: int, phase: Any) -> None:
    where = f"phases.{index}"
    if not isinstance(phase, dict):
        raise ValueError(f"{where} is {phase!r}, expected a table")
    for key in phase:
        if key not in _PHASE_KEYS:
            raise ValueError(
                f"{where}.{key} can't differ between phases; a phase may set {', '.join(_PHASE_KEYS)}"
            )
    for key in phase.get("model", {}):
        if key not in _PHASE_MODEL_KEYS:
            raise ValueError(
                f"{where}.model.{key} can't differ between phases; {', '.join(_PHASE_MODEL_KEYS)} may"
            )
    if not isinstance(phase.get("images"), int) or phase["images"] < 1:
        raise ValueError(f"{where}.images is {phase.get('images')!r}, expected how many images it sees")


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            key: _merged(base[key], value)
            if isinstance(value, dict) and isinstance(base.get(key), dict)
            else value
            for key, value in changes.items()
        },
    }


@cache
def _initial_config(path: str) -> AutoencoderConfig:
    from latentae.models.initialization import load_initial

    return load_initial(path).config


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
        if result.model.preset != "init":
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
        raise RecipeError(
            f"unknown recipe {recipe!r}; {hint} A recipe of your own is a path that ends in .toml"
        )
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
        number, key = int(of_phase[1]), of_phase[2]
        if number >= len(values.get("phases", ())):
            raise RecipeError(
                f"{name}: there is no phase {number}; it has {len(values.get('phases', ()))}, counted from 0"
            )
        values.pop("images", None)  # the sum of the phases': it may change now
        values = values["phases"][number]
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
    choices = get_args(field.annotation)
    takes_text = str in (field.annotation, *choices) or (
        get_origin(field.annotation) is Literal and isinstance(choices[0], str)
    )
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
    if first["type"] == "value_error":  # a check of ours over several options, which it names
        return f"{name}: {first['msg'].removeprefix('Value error, ')}"
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
