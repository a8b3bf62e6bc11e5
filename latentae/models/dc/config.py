"""The shape of a deep-compression autoencoder: diffusers' AutoencoderDC config keys, and named presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from latentae.models.base_config import AutoencoderConfig

__all__ = ["DC_PRESETS", "AutoencoderDCConfig", "dc_values"]

BLOCKS = ("ResBlock", "EfficientViTBlock")
NORMS = ("rms_norm", "batch_norm")
ACTS = ("silu", "swish", "relu", "gelu", "mish")
_OWN = ("bottleneck", "sample_size")  # no keys of diffusers
_SIDES = ("encoder", "decoder")


class AutoencoderDCConfig(AutoencoderConfig):
    """Every key of a diffusers AutoencoderDC `config.json`, with the same names, meanings and defaults, and two of ours.

    Levels are counted from fine to coarse; lists may be longer than there are levels, as in diffusers, and their rest means nothing.
    Levels are as many as `encoder_block_out_channels`. The finest level may have no block: images are then halved at once, and the
    widths of that level mean nothing.
    """

    class_name = "AutoencoderDC"

    in_channels: int = Field(default=3, ge=1, description="Image channels in and out.")
    latent_channels: int = Field(default=32, ge=1, description="Channels of the latent, z.")
    attention_head_dim: int = Field(default=32, ge=1, description="Channels of an attention head.")
    encoder_block_types: str | tuple[str, ...] = Field(
        default="ResBlock", description="Kind of block, of all levels or each."
    )
    decoder_block_types: str | tuple[str, ...] = Field(
        default="ResBlock", description="The same of the decoder."
    )
    encoder_block_out_channels: tuple[int, ...] = Field(
        default=(128, 256, 512, 512, 1024, 1024), min_length=1, description="Channels of each level."
    )
    decoder_block_out_channels: tuple[int, ...] = Field(
        default=(128, 256, 512, 512, 1024, 1024), min_length=1, description="The same of the decoder."
    )
    encoder_layers_per_block: tuple[int, ...] = Field(
        default=(2, 2, 2, 3, 3, 3), description="Blocks of each level."
    )
    decoder_layers_per_block: tuple[int, ...] = Field(
        default=(3, 3, 3, 3, 3, 3), description="The same of the decoder."
    )
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = Field(
        default=((), (), (), (5,), (5,), (5,)),
        description="Windows through which attention also looks, in each level.",
    )
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = Field(
        default=((), (), (), (5,), (5,), (5,)), description="The same of the decoder."
    )
    upsample_block_type: str = Field(
        default="pixel_shuffle", description="How the decoder doubles: or 'interpolate'."
    )
    downsample_block_type: str = Field(
        default="pixel_unshuffle", description="How the encoder halves: or 'conv'."
    )
    decoder_norm_types: str | tuple[str, ...] = Field(
        default="rms_norm", description="Norm of the decoder's blocks."
    )
    decoder_act_fns: str | tuple[str, ...] = Field(
        default="silu", description="Activation of the decoder's residual blocks."
    )
    encoder_out_shortcut: bool = Field(
        default=True, description="Averages of channels are added to the latent."
    )
    decoder_in_shortcut: bool = Field(
        default=True, description="The latent, repeated, is added to the decoder's first map."
    )
    decoder_conv_act_fn: str = Field(default="relu", description="Activation before the last convolution.")
    scaling_factor: float = Field(
        default=1.0, gt=0, description="Latents are multiplied by it for a diffusion model."
    )

    bottleneck: Literal["deterministic", "gaussian"] = Field(
        default="deterministic",
        description="Whether a second head predicts the log-variance of a posterior. diffusers' class has none: an export drops it.",
    )
    sample_size: int | tuple[int, ...] = Field(
        default=512, description="Image side in pixels the model was made for; not kept in config.json."
    )

    @model_validator(mode="after")
    def _consistent(self) -> AutoencoderDCConfig:
        levels = len(self.encoder_block_out_channels)
        if len(self.decoder_block_out_channels) != levels:
            raise ValueError(
                f"encoder_block_out_channels has {levels} levels but decoder_block_out_channels "
                f"{len(self.decoder_block_out_channels)}; give one of each per level"
            )
        for side in _SIDES:
            self._check_lists(side, levels)
            self._check_widths(side)
        _check_names("decoder_norm_types", self.decoder_norm_types, levels, NORMS)
        _check_names("decoder_act_fns", self.decoder_act_fns, levels, ACTS, fold=True)
        _check_names("decoder_conv_act_fn", self.decoder_conv_act_fn, levels, ACTS, fold=True)
        _check_names(
            "downsample_block_type",
            self.downsample_block_type,
            levels,
            ("pixel_unshuffle", "conv"),
            fold=True,
        )
        _check_names(
            "upsample_block_type", self.upsample_block_type, levels, ("pixel_shuffle", "interpolate")
        )
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
        """Nothing is subtracted from the latents of this family."""
        return 0.0

    def side(self, name: str) -> list[tuple[str, int, int, tuple[int, ...]]]:
        """Kind of block, width, blocks and attention windows of each level of the "encoder" or "decoder"."""
        widths = getattr(self, f"{name}_block_out_channels")
        kinds = per_level(getattr(self, f"{name}_block_types"), len(widths))
        layers, windows = getattr(self, f"{name}_layers_per_block"), getattr(self, f"{name}_qkv_multiscales")
        return list(zip(kinds, widths, layers, windows, strict=False))

    def diffusers_dict(self) -> dict[str, Any]:
        """The values as plain JSON types, with the class name diffusers looks for; of ours only a posterior's head, which has weights."""
        values = super().diffusers_dict()
        own = {name: values.pop(name) for name in _OWN}
        return {**values, "bottleneck": "gaussian"} if own["bottleneck"] == "gaussian" else values

    def _check_lists(self, side: str, levels: int) -> None:
        """Long enough, of known blocks; only the finest and the coarsest level may be empty."""
        _check_names(f"{side}_block_types", getattr(self, f"{side}_block_types"), levels, BLOCKS)
        for name in ("layers_per_block", "qkv_multiscales"):
            found = len(getattr(self, f"{side}_{name}"))
            if found < levels:
                raise ValueError(
                    f"{side}_{name} has {found} levels, {side}_block_out_channels {levels}; give one of each per level"
                )
        for level, (kind, width, layers, windows) in enumerate(self.side(side)):
            if layers < 0 or (layers == 0 and 0 < level < levels - 1) or (layers == 0 and levels == 1):
                raise ValueError(
                    f"{side}_layers_per_block has {layers} at level {level}; only the finest and the coarsest of several may be empty"
                )
            if width < 1 or any(window < 1 or window % 2 == 0 for window in windows):
                raise ValueError(
                    f"{side} level {level} has {width} channels and windows {list(windows)}; windows are odd numbers"
                )
            if kind == "EfficientViTBlock" and layers and width < self.attention_head_dim:
                raise ValueError(
                    f"{side} level {level} has {width} channels, attention_head_dim is {self.attention_head_dim}; a head needs as many"
                )

    def _check_widths(self, side: str) -> None:
        """Averages and repetitions of channels come out even."""
        widths, layers = (
            getattr(self, f"{side}_block_out_channels"),
            getattr(self, f"{side}_layers_per_block"),
        )
        for level in range(0 if layers[0] else 1, len(widths) - 1):
            fine, coarse = widths[level : level + 2]
            if (
                4 * fine % coarse
            ):  # four pixels become one: their values are averaged to so many, or repeated from so many
                raise ValueError(
                    f"{side}_block_out_channels goes from {fine} to {coarse}, which does not divide 4 x {fine}"
                )
        unshuffled = side == "encoder" and self.downsample_block_type == "pixel_unshuffle"
        if unshuffled and any(width % 4 for width in widths[1:]):
            raise ValueError(
                f"encoder_block_out_channels is {list(widths)}; all but the first are multiples of 4 for 'pixel_unshuffle'"
            )
        name = "encoder_out_shortcut" if side == "encoder" else "decoder_in_shortcut"
        if getattr(self, name) and widths[-1] % self.latent_channels:
            raise ValueError(
                f"{side}_block_out_channels ends with {widths[-1]}, which latent_channels {self.latent_channels} does not divide; "
                f"choose another, or set {name} = false"
            )


def per_level(value: str | tuple[str, ...], levels: int) -> tuple[str, ...]:
    """One name for each level."""
    return (value,) * levels if isinstance(value, str) else value[:levels]


def _check_names(
    key: str, value: str | tuple[str, ...], levels: int, known: tuple[str, ...], fold: bool = False
) -> None:
    names = per_level(value, levels)
    if len(names) < levels:
        raise ValueError(
            f"{key} has {len(names)} levels, the model {levels}; give one of each per level, or one name for all"
        )
    for name in names:
        if (name.lower() if fold else name) not in known:
            raise ValueError(f"{key} has {name!r}; this family knows {', '.join(known)}")


def _family(
    widths: tuple[int, ...],
    z: int,
    attention: int,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    windows: tuple[int, ...] = (5,),
) -> dict[str, Any]:
    """Values of a config whose `attention` coarsest levels attend, with the encoder's and the decoder's `layers`."""
    attends = [level >= len(widths) - attention for level in range(len(widths))]
    values: dict[str, Any] = {"latent_channels": z}
    for side, depths in zip(_SIDES, layers, strict=True):
        values[f"{side}_block_types"] = tuple(BLOCKS[attending] for attending in attends)
        values[f"{side}_block_out_channels"] = widths
        values[f"{side}_layers_per_block"] = depths
        values[f"{side}_qkv_multiscales"] = tuple(windows if attending else () for attending in attends)
    return values


# The widths and depths of f32 and f64 are those of mit-han-lab's dc-ae-f32c32-in-1.0 and dc-ae-f64c128-in-1.0, whose attention has no
# windows. Those have batch normalization and ReLU in the decoder's three finest levels; a model that is trained anew has RMSNorm and
# SiLU there, as dc-ae-f32c32-sana-1.0 has. f8 and f16 are this library's choice, of the same parts.
DC_PRESETS: dict[str, dict[str, Any]] = {
    "dc-f8": _family((128, 256, 512, 512), 16, 1, ((2, 2, 2, 3), (3, 3, 3, 3))),
    "dc-f16": _family((128, 256, 512, 512, 1024), 32, 2, ((2, 2, 2, 3, 3), (3, 3, 3, 3, 3))),
    "dc-f32-z32": _family(
        (128, 256, 512, 512, 1024, 1024), 32, 3, ((0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2)), ()
    ),
    "dc-f64-z128": _family(
        (128, 256, 512, 512, 1024, 1024, 2048), 128, 4, ((0, 4, 8, 2, 2, 2, 2), (0, 5, 10, 2, 2, 2, 2)), ()
    ),
    "dc-tiny": {**_family((24, 48, 96, 192), 16, 0, ((1, 1, 1, 0), (1, 1, 1, 0))), "sample_size": 64},
}


def dc_values(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The values of a preset with single keys replaced.

    `block_out_channels` and `layers_per_block` (a number, or one for each level) stand for those of both sides; a number leaves
    levels without a block empty.
    """
    values = {**DC_PRESETS[name], **overrides}
    if "out_channels" in values and values["out_channels"] == values.get("in_channels", 3):
        del values["out_channels"]  # this family has no others
    widths, layers = values.pop("block_out_channels", None), values.pop("layers_per_block", None)
    for side in _SIDES:
        if widths is not None:
            values[f"{side}_block_out_channels"] = widths
        if layers is not None:
            before = values[f"{side}_layers_per_block"]
            values[f"{side}_layers_per_block"] = (
                tuple(layers * (n > 0) for n in before) if isinstance(layers, int) else layers
            )
    return values
