"""What every autoencoder's config is: pydantic, under diffusers' own keys."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from latentae.errors import ModelError, some
from latentae.progress import note

__all__ = ["AutoencoderConfig", "read_config_values"]


class AutoencoderConfig(BaseModel, ABC):
    """The shape of an autoencoder: what `config.json` says, under diffusers' keys where diffusers has the class."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    class_name: ClassVar[str]
    """`_class_name` in config.json."""

    if TYPE_CHECKING:  # fields of every subclass, each in its own order
        in_channels: int
        out_channels: int
        latent_channels: int
        sample_size: int | tuple[int, ...]
        scaling_factor: float
        shift_factor: float

    @property
    @abstractmethod
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""

    @classmethod
    def from_values(cls, values: Mapping[str, Any], path: str | Path) -> Self:
        """The content of a `config.json`; keys that start with `_` are diffusers' own notes and are left out.

        Keys that this family does not know, as a newer diffusers writes them, are left out and logged if they are null, which means
        unused.

        Raises:
            ModelError: it is of another class, or has a key or value this family does not know; `path` is named.
        """
        kind = values.get("_class_name", cls.class_name)
        if kind != cls.class_name:
            raise ModelError(f"{path} describes a {kind}; this loader reads {cls.class_name}")
        try:
            return cls(**_known_values(values, cls.model_fields, cls.class_name, path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ModelError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a diffusers `config.json`.

        Raises:
            ModelError: the file is missing, damaged, of another class, or has a key or value this family does not know.
        """
        return cls.from_values(read_config_values(path), path)

    def diffusers_dict(self) -> dict[str, Any]:
        """The values as plain JSON types, with the class name diffusers looks for."""
        return {
            "_class_name": self.class_name,
            "_diffusers_version": "0.34.0",
            **self.model_dump(mode="json"),
        }


def _known_values(
    values: Mapping[str, Any], known: Collection[str], name: str, path: str | Path
) -> dict[str, Any]:
    """The keys of a `config.json` that the class `name` knows. Unknown ones that are null, so unused, are logged and left out."""
    new = {key: value for key, value in values.items() if not key.startswith("_") and key not in known}
    used = [f"{key} = {json.dumps(value)}" for key, value in new.items() if value is not None]
    if used:
        raise ModelError(
            f"{path} has {some(used)}, which {name} does not know here (written by diffusers "
            f"{values.get('_diffusers_version', 'of no known version')}); update latentae, or delete the key if its value "
            "is the default there"
        )
    if new:
        note(f"{path}: left out {some(new)}, unknown here and null")
    return {key: value for key, value in values.items() if not key.startswith("_") and key not in new}


def read_config_values(path: str | Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises:
        ModelError: the file is missing or damaged.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"could not read {path}: {error.strerror}; a model folder needs a diffusers config.json"
        ) from error
    except ValueError as error:
        raise ModelError(
            f"{path} is not JSON ({error}); a model folder needs a diffusers config.json"
        ) from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}, expected an object with diffusers' keys")
    return values
