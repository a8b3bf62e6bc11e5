"""What a pipeline multiplies latents by: given, measured, or inherited, and honest about which."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from latentae.errors import RecipeError
from latentae.exporting.kinds import ExportableConfig
from latentae.exporting.measured import MeasuredLatents
from latentae.models.config import AutoencoderDCConfig

__all__ = ["LatentScaling", "check_scaling", "choose_scaling"]


@dataclass(frozen=True)
class LatentScaling:
    """A diffusion model sees (z - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float
    origin: str
    """Where the two come from, for the card."""
    measured: MeasuredLatents | None = None
    """Of the raw latents, before anything is folded into the weights."""
    folded: bool = False
    """Whether the weights normalise by channel, so that there is nothing left to scale or shift."""


def check_scaling(
    scaling_factor: float | None, shift_factor: float | None, folded: bool, statistics: bool
) -> None:
    """Refuse factors that can't be one, and folding that has nothing to fold or would leave something.

    Raises:
        RecipeError: see above.
    """
    if scaling_factor is not None and not 0 < scaling_factor < math.inf:
        raise RecipeError(
            f"scaling factor is {scaling_factor}, expected a positive number; it multiplies the latents"
        )
    if shift_factor is not None and not math.isfinite(shift_factor):
        raise RecipeError(
            f"shift factor is {shift_factor}, expected a finite number; it is subtracted from the latents"
        )
    if folded and (scaling_factor is not None or shift_factor is not None):
        raise RecipeError(
            "folding normalises by the measured statistics; leave the scaling and shift factors out, or do not fold"
        )
    if folded and not statistics:
        raise RecipeError(
            "folding needs the statistics of the latents; give statistics (a folder of encode or evaluate) or data"
        )


def choose_scaling(
    config: ExportableConfig,
    measured: MeasuredLatents | None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    *,
    folded: bool = False,
) -> LatentScaling:
    """A factor that was given wins over a measured one, and that over the config's; folded, there is nothing to choose.

    Pipelines shift no latents of an AutoencoderDC: its measured factor is 1 / root mean square, as diffusers defines it.
    """
    if isinstance(config, AutoencoderDCConfig) and measured is not None:
        squares = [mean**2 + std**2 for mean, std in zip(measured.mean, measured.std, strict=True)]
        factor = math.sqrt(len(squares) / sum(squares))
        measured = replace(measured, scaling_factor=factor, shift_factor=0.0)
    if folded and measured is not None:
        return LatentScaling(
            1.0, 0.0, f"folded into the weights, by statistics over {measured.images} images", measured, True
        )
    scaling, its_origin = _choose("scaling_factor", scaling_factor, measured, config)
    shift, other_origin = _choose("shift_factor", shift_factor, measured, config)
    origin = its_origin if its_origin == other_origin else f"scaling: {its_origin}; shift: {other_origin}"
    return LatentScaling(scaling, shift, origin, measured)


def _choose(
    name: str, given: float | None, measured: MeasuredLatents | None, config: ExportableConfig
) -> tuple[float, str]:
    if given is not None:
        return float(given), "given at export"
    if measured is not None:
        return getattr(measured, name), f"measured over {measured.images} images"
    return getattr(config, name), "the config's value, not measured for these weights"
