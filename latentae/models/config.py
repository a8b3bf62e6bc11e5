"""The shape of an autoencoder: diffusers' own config keys, and named presets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from latentae.errors import ModelError
from latentae.models.base_config import AutoencoderConfig, read_config_values
from latentae.models.dc.config import DC_PRESETS, AutoencoderDCConfig, dc_values

__all__ = [
    "LINEAR",
    "PRESETS",
    "AutoencoderConfig",
    "AutoencoderDCConfig",
    "AutoencoderKLConfig",
    "LinearAutoencoderConfig",
    "preset",
    "preset_config",
    "preset_kind",
    "preset_names",
    "read_config",
    "read_config_values",
]

LINEAR = "linear"  # the preset of the linear autoencoder
_Config = TypeVar("_Config", bound="AutoencoderConfig")

DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


class AutoencoderKLConfig(AutoencoderConfig):
    """Every key of a diffusers AutoencoderKL `config.json`, with the same names, meanings and defaults."""

    class_name = "AutoencoderKL"

    in_channels: int = Field(default=3, ge=1, description="Image channels in.")
    out_channels: int = Field(default=3, ge=1, description="Image channels out.")
    down_block_types: tuple[str, ...] = Field(
        default=("DownEncoderBlock2D",), description="Encoder levels, from fine to coarse."
    )
    up_block_types: tuple[str, ...] = Field(
        default=("UpDecoderBlock2D",), description="Decoder levels, from coarse to fine."
    )
    block_out_channels: tuple[int, ...] = Field(
        default=(64,), description="Channels of each level, from fine to coarse."
    )
    layers_per_block: int = Field(
        default=1, ge=1, description="Residual blocks per encoder level; a decoder level has one more."
    )
    act_fn: str = Field(
        default="silu",
        pattern="^(silu|swish)$",
        description="Activation; SiLU is the only one of this family.",
    )
    latent_channels: int = Field(default=4, ge=1, description="Channels of the latent, z.")
    norm_num_groups: int = Field(default=32, ge=1, description="Groups of every GroupNorm.")
    sample_size: int | tuple[int, ...] = Field(
        default=256, description="Image side in pixels the model was made for; diffusers' tile size."
    )
    scaling_factor: float = Field(
        default=0.18215, gt=0, description="Latents are multiplied by it for a diffusion model."
    )
    shift_factor: float = Field(default=0.0, description="Subtracted from latents before scaling.")
    latents_mean: tuple[float, ...] | None = Field(
        default=None, description="Per-channel mean of the latents."
    )
    latents_std: tuple[float, ...] | None = Field(
        default=None, description="Per-channel standard deviation of the latents."
    )
    force_upcast: bool = Field(
        default=True, description="Pipelines run the model in fp32 even when the rest is fp16."
    )
    use_quant_conv: bool = Field(default=True, description="A 1x1 convolution after the encoder.")
    use_post_quant_conv: bool = Field(default=True, description="A 1x1 convolution before the decoder.")
    mid_block_add_attention: bool = Field(
        default=True, description="One attention layer in the middle of encoder and decoder."
    )

    @field_validator("shift_factor", mode="before")
    @classmethod
    def _null_shift(cls, value: Any) -> Any:
        return 0.0 if value is None else value

    @field_validator("force_upcast", mode="before")
    @classmethod
    def _null_upcast(cls, value: Any) -> Any:
        return True if value is None else value

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderKLConfig:
        levels = len(self.block_out_channels)
        if len(self.down_block_types) != levels or len(self.up_block_types) != levels:
            raise ValueError(
                f"block_out_channels has {levels} levels but down_block_types {len(self.down_block_types)} "
                f"and up_block_types {len(self.up_block_types)}; give one of each per level"
            )
        for name in self.down_block_types:
            if name not in DOWN:
                raise ValueError(f"down_block_types has {name!r}; this family knows {' and '.join(DOWN)}")
        for name in self.up_block_types:
            if name not in UP:
                raise ValueError(f"up_block_types has {name!r}; this family knows {' and '.join(UP)}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels has {channels}, which norm_num_groups {self.norm_num_groups} does not divide"
                )
        return self

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return 2 ** (len(self.block_out_channels) - 1)


class LinearAutoencoderConfig(AutoencoderConfig):
    """The shape of a linear autoencoder. diffusers has no such class; keys that it has elsewhere keep their names and meanings."""

    class_name = "LinearAutoencoder"

    in_channels: int = Field(default=3, ge=1, description="Image channels in.")
    out_channels: int = Field(default=3, ge=1, description="Image channels out.")
    latent_channels: int = Field(
        default=16, ge=1, description="Channels of the latent, z: components kept of each patch."
    )
    patch: int = Field(
        default=8, ge=1, description="Side in pixels of the patch that becomes one latent pixel."
    )
    tied: bool = Field(
        default=True, description="Encoder and decoder share one weight, the one the other's transpose."
    )
    sample_size: int | tuple[int, ...] = Field(
        default=256, description="Image side in pixels the model was made for."
    )
    scaling_factor: float = Field(
        default=1.0, gt=0, description="Latents are multiplied by it for a diffusion model."
    )
    shift_factor: float = Field(default=0.0, description="Subtracted from latents before scaling.")

    @model_validator(mode="after")
    def _consistent(self) -> LinearAutoencoderConfig:
        if self.tied and self.in_channels != self.out_channels:
            raise ValueError(
                f"tied weights need as many channels out as in, not {self.in_channels} in and {self.out_channels} out; set tied = false"
            )
        numbers = min(self.in_channels, self.out_channels) * self.patch**2
        if self.latent_channels > numbers:
            raise ValueError(
                f"latent_channels is {self.latent_channels}, but a patch of {self.patch} x {self.patch} has {numbers} numbers; keep fewer"
            )
        return self

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along a side, f."""
        return self.patch


def _family(
    multipliers: tuple[int, ...], latent: int, attention: tuple[int, ...] = (), width: int = 128, **rest: Any
) -> dict[str, Any]:
    """Values of an LDM-style config; `attention` names the levels (0 is the finest) with attention after every residual block."""
    levels = range(len(multipliers))
    down = tuple(DOWN[level in attention] for level in levels)
    up = tuple(UP[level in attention] for level in reversed(levels))
    values = {
        "block_out_channels": tuple(width * m for m in multipliers),
        "down_block_types": down,
        "up_block_types": up,
        "latent_channels": latent,
        "layers_per_block": 2,
        "norm_num_groups": 32,
    }
    return {**values, **rest}


# LDM's model zoo (Rombach et al. 2022, table 8): base width 128; attention at side 16 (and 8) of a 256-pixel input.
PRESETS: dict[str, dict[str, Any]] = {
    "kl-f4": _family((1, 2, 4), latent=3),
    "kl-f8": _family((1, 2, 4, 4), latent=4),
    "kl-f8-z16": _family((1, 2, 4, 4), latent=16),
    "kl-f16": _family((1, 1, 2, 2, 4), latent=16, attention=(4,)),
    "kl-f16-z32": _family((1, 1, 2, 2, 4), latent=32, attention=(4,)),  # VA-VAE (Yao & Wang 2025)
    "kl-f32": _family((1, 1, 2, 2, 4, 4), latent=64, attention=(4, 5)),
    "tiny": _family(
        (1, 2, 4),
        latent=8,
        width=16,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=64,
    ),
    "tiny-f8": _family(
        (1, 2, 2, 4),
        latent=16,
        width=16,
        layers_per_block=1,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=64,
    ),
}


def preset(name: str, **overrides: Any) -> AutoencoderKLConfig:
    """A named config of the KL autoencoder with single keys replaced.

    Raises:
        ModelError: unknown preset or a value that does not fit.
    """
    if name not in PRESETS:
        raise ModelError(f"unknown model preset {name!r}; the presets are {', '.join(PRESETS)}")
    return _checked(AutoencoderKLConfig, name, {**PRESETS[name], **overrides})


def preset_names() -> list[str]:
    """The presets of all architectures."""
    return [*PRESETS, *DC_PRESETS, LINEAR]


def preset_kind(name: str) -> type[AutoencoderConfig]:
    """The class of a preset's config.

    Raises:
        ModelError: unknown preset.
    """
    if name not in preset_names():
        raise ModelError(f"unknown model preset {name!r}; the presets are {', '.join(preset_names())}")
    return (
        AutoencoderDCConfig
        if name in DC_PRESETS
        else LinearAutoencoderConfig
        if name == LINEAR
        else AutoencoderKLConfig
    )


def preset_config(name: str, **overrides: Any) -> AutoencoderConfig:
    """A named config of any architecture, with single keys replaced. One number of image channels given is that of both sides.

    Raises:
        ModelError: unknown preset or a value that does not fit.
    """
    if "in_channels" in overrides:
        overrides.setdefault("out_channels", overrides["in_channels"])
    kind = preset_kind(name)
    if kind is LinearAutoencoderConfig:
        return _checked(LinearAutoencoderConfig, name, overrides)
    if kind is AutoencoderDCConfig:
        return _checked(AutoencoderDCConfig, name, dc_values(name, overrides))
    return preset(name, **overrides)


def _checked(kind: type[_Config], name: str, values: dict[str, Any]) -> _Config:
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelError(f"model preset {name}: {where + ': ' if where else ''}{first['msg']}") from error


def read_config(path: str | Path) -> AutoencoderConfig:
    """The config in a `config.json`, of whichever class it names; AutoencoderKL where it names none.

    Raises:
        ModelError: the file is missing, damaged, of an unknown class, or has a key or value its class does not know.
    """
    values = read_config_values(path)
    name = values.get("_class_name", AutoencoderKLConfig.class_name)
    classes: tuple[type[AutoencoderConfig], ...] = (
        AutoencoderKLConfig,
        AutoencoderDCConfig,
        LinearAutoencoderConfig,
    )
    kinds = {kind.class_name: kind for kind in classes}
    if name not in kinds:
        raise ModelError(f"{path} describes a {name}; this loader reads {', '.join(kinds)}")
    return kinds[name].from_values(values, path)
