"""Shapes of autoencoders: the content of `config.json`, with diffusers' keys."""

from __future__ import annotations

import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from latentae.errors import ModelError, some
from latentae.options import explain
from latentae.progress import note

__all__ = [
    "AutoencoderConfig",
    "AutoencoderDCConfig",
    "AutoencoderKLConfig",
    "ChannelsIn",
    "ChannelsOut",
    "LatentChannels",
    "Level",
    "LinearAutoencoderConfig",
    "SampleSize",
    "ScalingFactor",
    "ShiftFactor",
    "build",
    "check_values",
    "read_config",
    "read_config_values",
]

ChannelsIn = Annotated[int, Field(ge=1, description="Image channels in.")]
ChannelsOut = Annotated[int, Field(ge=1, description="Image channels out.")]
LatentChannels = Annotated[int, Field(ge=1, description="Channels of the latent, z.")]
SampleSize = Annotated[int | tuple[int, ...], Field(description="Image side; diffusers' tile size.")]
ScalingFactor = Annotated[float, Field(gt=0, description="Factor of latents for a diffusion model.")]
ShiftFactor = Annotated[float, Field(description="Subtracted from latents before scaling.")]

Counts = tuple[int, ...]
Widths = Annotated[Counts, Field(min_length=1, description="Channels of each level, fine to coarse.")]
DownBlock = Literal["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
UpBlock = Literal["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
DOWN, UP = get_args(DownBlock), get_args(UpBlock)

Config = TypeVar("Config", bound="AutoencoderConfig")


class AutoencoderConfig(BaseModel, ABC):
    """The shape of an autoencoder. A new one is also added to `CONFIGS`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    class_name: ClassVar[str]
    """`_class_name` in config.json."""
    architecture: ClassVar[str]
    """The class that it builds, as `module:name`; as text, because that module imports this one."""

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

    @property
    def image_side(self) -> int:
        """`sample_size` as one number: the shorter side in pixels."""
        return self.sample_size if isinstance(self.sample_size, int) else min(self.sample_size)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], path: str | Path) -> Self:
        """Check the content of a `config.json`.

        Keys that start with `_` are diffusers' notes and are ignored. Unknown keys with the value
        null are logged and ignored: a newer diffusers writes them for options that are not used.

        Raises:
            ModelError: another class, or an unknown key or value; the message names `path`.
        """
        name = values.get("_class_name", cls.class_name)
        if name != cls.class_name:
            raise ModelError(f"{path} describes a {name}; this loader reads {cls.class_name}")
        return check_values(cls, _known_values(values, cls.model_fields, cls.class_name, path), path)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a diffusers `config.json`.

        Raises:
            ModelError: the file is missing, damaged or of another class, or has an unknown key or
                value.
        """
        return cls.from_values(read_config_values(path), path)

    def diffusers_dict(self) -> dict[str, Any]:
        """The values as plain JSON types, with the class name that diffusers looks up."""
        values = self.model_dump(mode="json")
        return {"_class_name": self.class_name, "_diffusers_version": "0.34.0", **values}


def build(config: AutoencoderConfig) -> Any:
    """The `Autoencoder` of this shape with initial weights."""
    return pkgutil.resolve_name(config.architecture)(config)


def check_values(of: type[Config], values: Mapping[str, Any], source: str | Path) -> Config:
    """A config from its values.

    Raises:
        ModelError: a value that is not allowed; the message begins with `source`.
    """
    try:
        return of(**values)
    except ValidationError as error:
        raise ModelError(f"{source}: {explain(error, of.model_fields, list(of.model_fields))}") from error


def _known_values(
    values: Mapping[str, Any], known: Collection[str], name: str, path: str | Path
) -> dict[str, Any]:
    """The keys of a `config.json` that the class `name` has; unknown ones must be null."""
    own = {key: value for key, value in values.items() if not key.startswith("_")}
    new = {key: value for key, value in own.items() if key not in known}
    used = [f"{key} = {json.dumps(value)}" for key, value in new.items() if value is not None]
    if used:
        version = values.get("_diffusers_version", "of unknown version")
        raise ModelError(
            f"{path} has {some(used)}, which {name} does not know here (written by diffusers {version}); "
            "update latentae, or delete the key if its value is the default there"
        )
    if new:
        note(f"{path}: ignored {some(new)}, unknown here and null")
    return {key: value for key, value in own.items() if key in known}


def read_config_values(path: str | Path) -> dict[str, Any]:
    """The object in a `config.json`.

    Raises:
        ModelError: the file is missing or damaged.
    """
    advice = "a model folder needs a diffusers config.json"
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"could not read {path}: {error.strerror}; {advice}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds a {type(values).__name__}, expected an object with diffusers' keys")
    return values


def read_config(path: str | Path) -> AutoencoderConfig:
    """The config in a `config.json`, of the class that it names; AutoencoderKL if it names none.

    Raises:
        ModelError: the file is missing, damaged or of an unknown class, or has an unknown key or
            value.
    """
    values = read_config_values(path)
    name = values.get("_class_name", AutoencoderKLConfig.class_name)
    if name not in CONFIGS:
        raise ModelError(f"{path} describes a {name}; this loader reads {', '.join(CONFIGS)}")
    return CONFIGS[name].from_values(values, path)


class AutoencoderKLConfig(AutoencoderConfig):
    """Every key of a diffusers AutoencoderKL config, with the same meaning and default."""

    class_name = "AutoencoderKL"
    architecture = "latentae.models.autoencoder:AutoencoderKL"

    in_channels: ChannelsIn = 3
    out_channels: ChannelsOut = 3
    down_block_types: tuple[DownBlock, ...] = Field(
        default=("DownEncoderBlock2D",), description="Encoder levels, fine to coarse."
    )
    up_block_types: tuple[UpBlock, ...] = Field(
        default=("UpDecoderBlock2D",), description="Decoder levels, coarse to fine."
    )
    block_out_channels: Widths = (64,)
    layers_per_block: int = Field(
        default=1, ge=1, description="Blocks per encoder level; decoder levels have one more."
    )
    act_fn: Literal["silu", "swish"] = Field(default="silu", description="Activation: only SiLU.")
    latent_channels: LatentChannels = 4
    norm_num_groups: int = Field(default=32, ge=1, description="Groups of every GroupNorm.")
    sample_size: SampleSize = 256
    scaling_factor: ScalingFactor = 0.18215
    shift_factor: Annotated[ShiftFactor, BeforeValidator(lambda value: 0.0 if value is None else value)] = 0.0
    latents_mean: tuple[float, ...] | None = Field(default=None, description="Mean per latent channel.")
    latents_std: tuple[float, ...] | None = Field(default=None, description="Deviation per latent channel.")
    force_upcast: Annotated[bool, BeforeValidator(lambda value: True if value is None else value)] = Field(
        default=True, description="Pipelines run the model in fp32 even when the rest is fp16."
    )
    use_quant_conv: bool = Field(default=True, description="A 1x1 convolution after the encoder.")
    use_post_quant_conv: bool = Field(default=True, description="A 1x1 convolution before the decoder.")
    mid_block_add_attention: bool = Field(default=True, description="Attention in the middle blocks.")

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderKLConfig:
        levels, down, up = map(len, (self.block_out_channels, self.down_block_types, self.up_block_types))
        if down != levels or up != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels, down_block_types {down} and up_block_types {up}; "
                "give one of each per level"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, expected a multiple of norm_num_groups "
                    f"{self.norm_num_groups}"
                )
        return self

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return 2 ** (len(self.block_out_channels) - 1)


class LinearAutoencoderConfig(AutoencoderConfig):
    """The shape of a linear autoencoder, a class that diffusers does not have."""

    class_name = "LinearAutoencoder"
    architecture = "latentae.models.linear:LinearAutoencoder"

    in_channels: ChannelsIn = 3
    out_channels: ChannelsOut = 3
    latent_channels: LatentChannels = 16
    patch: int = Field(default=8, ge=1, description="Side in pixels of the patch behind one latent pixel.")
    tied: bool = Field(default=True, description="The decoder's weight is the encoder's, transposed.")
    sample_size: SampleSize = 256
    scaling_factor: ScalingFactor = 1.0
    shift_factor: ShiftFactor = 0.0

    @model_validator(mode="after")
    def _consistent(self) -> LinearAutoencoderConfig:
        if self.tied and self.in_channels != self.out_channels:
            raise ValueError(
                f"in_channels is {self.in_channels} and out_channels {self.out_channels}, but tied weights "
                "need equal ones; set tied = false"
            )
        numbers = min(self.in_channels, self.out_channels) * self.patch**2
        if self.latent_channels > numbers:
            raise ValueError(
                f"latent_channels is {self.latent_channels}, but a patch of {self.patch} x {self.patch} has "
                f"{numbers} numbers; use at most that many"
            )
        return self

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return self.patch


SIDES = ("encoder", "decoder")
DC_BLOCKS = ("ResBlock", "EfficientViTBlock")
_ACTS = ("silu", "swish", "relu", "gelu", "mish")
# The names that these keys know, in lower case where diffusers ignores the case.
_DC_NAMES: dict[str, tuple[str, ...]] = {
    "encoder_block_types": DC_BLOCKS,
    "decoder_block_types": DC_BLOCKS,
    "decoder_norm_types": ("rms_norm", "batch_norm"),
    "decoder_act_fns": _ACTS,
    "decoder_conv_act_fn": _ACTS,
    "downsample_block_type": ("pixel_unshuffle", "conv"),
    "upsample_block_type": ("pixel_shuffle", "interpolate"),
}
_ANY_CASE = ("decoder_act_fns", "decoder_conv_act_fn", "downsample_block_type")

Names = str | tuple[str, ...]
BlockTypes = Annotated[Names, Field(description="Block type of every level, or of each.")]
Depths = Annotated[Counts, Field(description="Blocks of each level.")]
Windows = Annotated[tuple[Counts, ...], Field(description="Extra attention windows of each level.")]


class Level(NamedTuple):
    """One level of an AutoencoderDC's encoder or decoder."""

    block: str
    width: int
    layers: int
    windows: Counts


class AutoencoderDCConfig(AutoencoderConfig):
    """Every key of a diffusers AutoencoderDC config, with the same meaning and default, and two of
    ours.

    Levels are counted from fine to coarse; `encoder_block_out_channels` gives their number. As in
    diffusers, lists may be longer: the rest is ignored. The finest level may have no block: then
    the first layer halves the image and the width of that level is ignored.
    """

    class_name = "AutoencoderDC"
    architecture = "latentae.models.dc.autoencoder:AutoencoderDC"

    in_channels: ChannelsIn = 3
    latent_channels: LatentChannels = 32
    attention_head_dim: int = Field(default=32, ge=1, description="Channels of an attention head.")
    encoder_block_types: BlockTypes = "ResBlock"
    decoder_block_types: BlockTypes = "ResBlock"
    encoder_block_out_channels: Widths = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: Widths = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: Depths = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: Depths = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: Windows = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: Windows = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = Field(default="pixel_shuffle", description="'pixel_shuffle' or 'interpolate'.")
    downsample_block_type: str = Field(default="pixel_unshuffle", description="'pixel_unshuffle' or 'conv'.")
    decoder_norm_types: Names = Field(default="rms_norm", description="Norm of the decoder's blocks.")
    decoder_act_fns: Names = Field(default="silu", description="Activation of the decoder's blocks.")
    encoder_out_shortcut: bool = Field(default=True, description="Add averaged channels to the latent.")
    decoder_in_shortcut: bool = Field(default=True, description="Add the repeated latent to the first map.")
    decoder_conv_act_fn: str = Field(default="relu", description="Activation before the last convolution.")
    scaling_factor: ScalingFactor = 1.0

    bottleneck: Literal["deterministic", "gaussian"] = Field(
        default="deterministic", description="'gaussian' adds a head for the log-variance; exports drop it."
    )
    sample_size: SampleSize = 512  # config.json does not have it

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderDCConfig:
        levels, decoder = len(self.encoder_block_out_channels), len(self.decoder_block_out_channels)
        if decoder != levels:
            raise ValueError(
                f"encoder_block_out_channels has {levels} levels but decoder_block_out_channels {decoder}; "
                "give one of each per level"
            )
        for key, known in _DC_NAMES.items():
            self._check_names(key, known)
        for side in SIDES:
            self._check_levels(side)
            self._check_widths(side)
        return self

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def out_channels(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Image channels out: as many as in."""
        return self.in_channels

    @property
    def shift_factor(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Always 0."""
        return 0.0

    def per_level(self, key: str) -> tuple[str, ...]:
        """The names under a key, one per level, in lower case where diffusers ignores the case."""
        levels, value = len(self.encoder_block_out_channels), getattr(self, key)
        names = (value,) * levels if isinstance(value, str) else value[:levels]
        return tuple(name.lower() for name in names) if key in _ANY_CASE else names

    def side(self, name: str) -> list[Level]:
        """The levels of the "encoder" or "decoder", from fine to coarse."""
        keys = ("block_out_channels", "layers_per_block", "qkv_multiscales")
        lists = (getattr(self, f"{name}_{key}") for key in keys)
        return [Level(*level) for level in zip(self.per_level(f"{name}_block_types"), *lists, strict=False)]

    def diffusers_dict(self) -> dict[str, Any]:
        """The values as plain JSON types; of our own keys only a "gaussian" bottleneck."""
        values = super().diffusers_dict()
        del values["sample_size"]
        if self.bottleneck == "deterministic":
            del values["bottleneck"]
        return values

    def _check_names(self, key: str, known: tuple[str, ...]) -> None:
        names, levels = self.per_level(key), len(self.encoder_block_out_channels)
        if len(names) < levels:
            raise ValueError(
                f"{key} has {len(names)} levels, the model {levels}; give one per level, or one name for all"
            )
        for name in names:
            if name not in known:
                raise ValueError(f"{key} has {name!r}; this family knows {', '.join(known)}")

    def _check_levels(self, side: str) -> None:
        levels = len(self.encoder_block_out_channels)
        for key in (f"{side}_layers_per_block", f"{side}_qkv_multiscales"):
            if (found := len(getattr(self, key))) < levels:
                raise ValueError(f"{key} has {found} levels, the model {levels}; give one per level")
        for index, (block, width, layers, windows) in enumerate(self.side(side)):
            inner = 0 < index < levels - 1 or levels == 1
            if layers < 0 or (layers == 0 and inner):
                raise ValueError(
                    f"{side}_layers_per_block has {layers} at level {index}; only the finest and the "
                    "coarsest of several may be empty"
                )
            if width < 1 or any(window < 1 or window % 2 == 0 for window in windows):
                raise ValueError(
                    f"{side} level {index} has {width} channels and windows {list(windows)}; windows are odd"
                )
            head = self.attention_head_dim
            if block == "EfficientViTBlock" and layers and width < head:
                raise ValueError(
                    f"{side} level {index} has {width} channels, attention_head_dim is {head}; a head needs "
                    "as many"
                )

    def _check_widths(self, side: str) -> None:
        """Check that shortcuts can average or repeat channels."""
        key = f"{side}_block_out_channels"
        widths: Counts = getattr(self, key)
        first = 0 if getattr(self, f"{side}_layers_per_block")[0] else 1
        for fine, coarse in zip(widths[first:], widths[first + 1 :], strict=False):
            if 4 * fine % coarse:  # 2 x 2 pixels become the channels of one
                raise ValueError(f"{key} goes from {fine} to {coarse}, which does not divide 4 x {fine}")
        unshuffled = side == "encoder" and self.downsample_block_type == "pixel_unshuffle"
        if unshuffled and any(width % 4 for width in widths[1:]):
            raise ValueError(
                f"{key} is {list(widths)}; all but the first must be multiples of 4 for 'pixel_unshuffle'"
            )
        shortcut = "encoder_out_shortcut" if side == "encoder" else "decoder_in_shortcut"
        if getattr(self, shortcut) and widths[-1] % self.latent_channels:
            raise ValueError(
                f"{key} ends with {widths[-1]}, which latent_channels {self.latent_channels} does not "
                f"divide; choose another, or set {shortcut} = false"
            )


CONFIGS: dict[str, type[AutoencoderConfig]] = {
    of.class_name: of for of in (AutoencoderKLConfig, AutoencoderDCConfig, LinearAutoencoderConfig)
}
"""All architectures by the name of their class."""
