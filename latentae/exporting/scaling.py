"""What a pipeline multiplies latents by: given, measured, or inherited, and honest about which."""

from __future__ import annotations

import math
from dataclasses import dataclass

from latentae.errors import RecipeError
from latentae.exporting.measured import MeasuredLatents
from latentae.models.config import AutoencoderKLConfig

__all__ = ["LatentScaling", "choose_scaling"]


@dataclass(frozen=True)
class LatentScaling:
    """A diffusion model sees (z - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float
    origin: str
    """Where the two come from, for the card."""
    measured: MeasuredLatents | None = None


def choose_scaling(
    config: AutoencoderKLConfig, measured: MeasuredLatents | None, scaling_factor: float | None, shift_factor: float | None
) -> LatentScaling:
    """A factor that was given wins over a measured one, and that over the config's.

    Raises:
        RecipeError: a factor that can't be one.
    """
    if scaling_factor is not None and not 0 < scaling_factor < math.inf:
        raise RecipeError(f"scaling factor is {scaling_factor}, expected a positive number; it multiplies the latents")
    if shift_factor is not None and not math.isfinite(shift_factor):
        raise RecipeError(f"shift factor is {shift_factor}, expected a finite number; it is subtracted from the latents")
    scaling, its_origin = _choose("scaling_factor", scaling_factor, measured, config)
    shift, other_origin = _choose("shift_factor", shift_factor, measured, config)
    origin = its_origin if its_origin == other_origin else f"scaling: {its_origin}; shift: {other_origin}"
    return LatentScaling(scaling, shift, origin, measured)


def _choose(name: str, given: float | None, measured: MeasuredLatents | None, config: AutoencoderKLConfig) -> tuple[float, str]:
    if given is not None:
        return float(given), "given at export"
    if measured is not None:
        return getattr(measured, name), f"measured over {measured.images} images"
    return getattr(config, name), "the config's value, not measured for these weights"
