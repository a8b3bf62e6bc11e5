"""Named shapes of autoencoders."""

from __future__ import annotations

from typing import Any

from latentae.errors import ModelError
from latentae.models.config import (
    DC_BLOCKS,
    DOWN,
    SIDES,
    UP,
    AutoencoderConfig,
    AutoencoderDCConfig,
    AutoencoderKLConfig,
    LinearAutoencoderConfig,
    check_values,
)

__all__ = ["DC_PRESETS", "LINEAR", "PRESETS", "preset", "preset_kind", "preset_names"]

Values = dict[str, Any]
LINEAR = "linear"  # the preset of the linear autoencoder


def _kl(
    multipliers: tuple[int, ...], latent: int, attention: tuple[int, ...] = (), width: int = 128, **rest: Any
) -> Values:
    """Values of an AutoencoderKL; the levels in `attention` attend, 0 is the finest."""
    levels = range(len(multipliers))
    return {
        "block_out_channels": tuple(width * m for m in multipliers),
        "down_block_types": tuple(DOWN[level in attention] for level in levels),
        "up_block_types": tuple(UP[level in attention] for level in reversed(levels)),
        "latent_channels": latent,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        **rest,
    }


_TINY: Values = {
    "width": 16,
    "layers_per_block": 1,
    "norm_num_groups": 1,
    "mid_block_add_attention": False,
    "sample_size": 64,
}

# LDM's model zoo (Rombach et al. 2022, table 8): base width 128; attention at side 16 (and 8) of
# 256 pixels.
PRESETS: dict[str, Values] = {
    "kl-f4": _kl((1, 2, 4), latent=3),
    "kl-f8": _kl((1, 2, 4, 4), latent=4),
    "kl-f8-z16": _kl((1, 2, 4, 4), latent=16),
    "kl-f16": _kl((1, 1, 2, 2, 4), latent=16, attention=(4,)),
    "kl-f16-z32": _kl((1, 1, 2, 2, 4), latent=32, attention=(4,)),  # VA-VAE (Yao & Wang 2025)
    "kl-f32": _kl((1, 1, 2, 2, 4, 4), latent=64, attention=(4, 5)),
    "tiny": _kl((1, 2, 4), latent=8, **_TINY),
    "tiny-f8": _kl((1, 2, 2, 4), latent=16, **_TINY),
}


def _dc(
    widths: tuple[int, ...],
    latent: int,
    attention: int,
    layers: tuple[tuple[int, ...], tuple[int, ...]],
    windows: tuple[int, ...] = (5,),
) -> Values:
    """Values of an AutoencoderDC; its `attention` coarsest levels attend."""
    attends = [level >= len(widths) - attention for level in range(len(widths))]
    values: Values = {"latent_channels": latent}
    for side, depths in zip(SIDES, layers, strict=True):
        values[f"{side}_block_types"] = tuple(DC_BLOCKS[attending] for attending in attends)
        values[f"{side}_block_out_channels"] = widths
        values[f"{side}_layers_per_block"] = depths
        values[f"{side}_qkv_multiscales"] = tuple(windows if attending else () for attending in attends)
    return values


# f32 and f64 have the widths and depths of mit-han-lab's dc-ae-f32c32-in-1.0 and
# dc-ae-f64c128-in-1.0, whose attention has no windows. Those have BatchNorm and ReLU in the
# decoder's three finest levels. A model that is trained from scratch has RMSNorm and SiLU there, as
# dc-ae-f32c32-sana-1.0 has. f8 and f16 are our choice.
DC_PRESETS: dict[str, Values] = {
    "dc-f8": _dc((128, 256, 512, 512), 16, 1, ((2, 2, 2, 3), (3, 3, 3, 3))),
    "dc-f16": _dc((128, 256, 512, 512, 1024), 32, 2, ((2, 2, 2, 3, 3), (3, 3, 3, 3, 3))),
    "dc-f32-z32": _dc((128, 256, 512, 512, 1024, 1024), 32, 3, ((0, 4, 8, 2, 2, 2), (0, 5, 10, 2, 2, 2)), ()),
    "dc-f64-z128": _dc(
        (128, 256, 512, 512, 1024, 1024, 2048), 128, 4, ((0, 4, 8, 2, 2, 2, 2), (0, 5, 10, 2, 2, 2, 2)), ()
    ),
    "dc-tiny": {**_dc((24, 48, 96, 192), 16, 0, ((1, 1, 1, 0), (1, 1, 1, 0))), "sample_size": 64},
}


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
    if name == LINEAR:
        return LinearAutoencoderConfig
    return AutoencoderDCConfig if name in DC_PRESETS else AutoencoderKLConfig


def preset(name: str, **overrides: Any) -> AutoencoderConfig:
    """A named config of any architecture, with single keys replaced.

    `out_channels` defaults to a given `in_channels`.

    Raises:
        ModelError: unknown preset or a value that does not fit.
    """
    if "in_channels" in overrides:
        overrides.setdefault("out_channels", overrides["in_channels"])
    of = preset_kind(name)
    if of is AutoencoderDCConfig:
        overrides = _of_both_sides(DC_PRESETS[name], overrides)
    values = {**PRESETS, **DC_PRESETS}.get(name, {})
    return check_values(of, {**values, **overrides}, f"model preset {name}")


def _of_both_sides(values: Values, overrides: Values) -> Values:
    """Apply `block_out_channels` and `layers_per_block` to both sides of an AutoencoderDC.

    One number of layers leaves empty levels empty.
    """
    overrides = dict(overrides)
    if overrides.get("out_channels") == overrides.get("in_channels", 3):
        overrides.pop("out_channels", None)  # this family has no such key
    widths, layers = overrides.pop("block_out_channels", None), overrides.pop("layers_per_block", None)
    for side in SIDES:
        if widths is not None:
            overrides[f"{side}_block_out_channels"] = widths
        if layers is not None:
            depths = overrides.get(key := f"{side}_layers_per_block", values[key])
            overrides[key] = tuple(layers * (n > 0) for n in depths) if isinstance(layers, int) else layers
    return overrides
