"""The latent scaling of a component: how it is chosen, and how it is folded into the weights.

Folding makes the latents' normalization n = (z - mean) / std part of the two 1x1 convolutions:

    quant_conv       W and b give z's mean, then log-variance; folded: W / std, (b - mean) / std for
                     the mean, and b - 2 log std for the log-variance
    post_quant_conv  W and b take z; folded: W diag(std), b + W mean

Folding is exact up to rounding, except where the posterior clamps log-variances to [-30, 20].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from latentae.errors import RecipeError
from latentae.exporting.formats import ExportableConfig
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig

__all__ = ["LatentScaling", "MeasuredLatents", "choose_scaling", "fold_normalization"]


@dataclass(frozen=True)
class MeasuredLatents:
    """Statistics of sampled latents over a set of images."""

    scaling_factor: float
    shift_factor: float
    mean: tuple[float, ...]
    """Per channel."""
    std: tuple[float, ...]
    """Per channel."""
    images: int

    def to_json(self, fingerprint: str) -> dict[str, Any]:
        """In the format of encode's `statistics.json`, for the model with this fingerprint."""
        return {
            "model": fingerprint,
            "samples": self.images,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "latents_mean": list(self.mean),
            "latents_std": list(self.std),
        }


@dataclass(frozen=True)
class LatentScaling:
    """A diffusion model sees (z - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float
    origin: str
    """Where both factors come from, for the card."""
    measured: MeasuredLatents | None = None
    """Of the raw latents, before folding."""
    folded: bool = False
    """Whether the weights normalize each channel, so that no scaling is left."""


def choose_scaling(
    config: ExportableConfig,
    measured: MeasuredLatents | None,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    *,
    folded: bool = False,
) -> LatentScaling:
    """Choose each factor: given, else measured, else the config's; 1 and 0 if folded.

    diffusers does not shift the latents of an AutoencoderDC. Its measured scaling factor is
    1 / root mean square, as diffusers defines it.
    """
    if isinstance(config, AutoencoderDCConfig) and measured is not None:
        squares = [mean**2 + std**2 for mean, std in zip(measured.mean, measured.std, strict=True)]
        factor = math.sqrt(len(squares) / sum(squares))
        measured = replace(measured, scaling_factor=factor, shift_factor=0.0)
    if folded and measured is not None:
        origin = f"folded into the weights, by statistics over {measured.images} images"
        return LatentScaling(1.0, 0.0, origin, measured, True)
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


def fold_normalization(
    model: AutoencoderKL, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> AutoencoderKL:
    """A copy of `model` with normalized latents; its config has scaling 1 and shift 0.

    A missing 1x1 convolution is added. The posterior is N((m - mean) / std, (s / std)^2) where the
    model's is N(m, s^2); `decode(n)` is the model's `decode(n * std + mean)`.

    Args:
        model: unchanged; the copy has its dtype, device and mode.
        mean: of the raw latents per channel, [z].
        std: standard deviation of the raw latents per channel, [z], positive.

    Raises:
        RecipeError: not one finite number per latent channel, or a standard deviation of 0.
    """
    z = model.config.latent_channels
    shift, scale = (torch.as_tensor(values, dtype=torch.float64).flatten().cpu() for values in (mean, std))
    if not len(shift) == len(scale) == z:
        raise RecipeError(
            f"mean and std have {len(shift)} and {len(scale)} numbers, the model has {z} latent channels"
        )
    if not (shift.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise RecipeError(
            "a latent channel has a mean that is not finite or a std that is not positive; "
            "export without folding"
        )
    folded = AutoencoderKL(_folded_config(model.config))
    folded.load_state_dict({**_identities(z), **copy.deepcopy(model.state_dict())})
    example = next(model.parameters())
    folded.to(example.device, example.dtype).train(model.training)
    _fold(folded, shift, scale)
    return folded


def _folded_config(config: AutoencoderKLConfig) -> AutoencoderKLConfig:
    neutral = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    convolutions = {"use_quant_conv": True, "use_post_quant_conv": True}
    return AutoencoderKLConfig(**{**config.model_dump(), **neutral, **convolutions})


def _identities(z: int) -> dict[str, Tensor]:
    """Both 1x1 convolutions as the identity."""
    return {
        f"{name}.{part}": value
        for name, width in (("quant_conv", 2 * z), ("post_quant_conv", z))
        for part, value in (("weight", torch.eye(width)[:, :, None, None]), ("bias", torch.zeros(width)))
    }


@torch.no_grad()
def _fold(model: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Fold mean and std, [z] in fp64, into both 1x1 convolutions in place."""
    encoder, decoder = model.quant_conv, model.post_quant_conv
    assert encoder is not None
    assert decoder is not None
    weight, bias = (p.cpu().double() for p in encoder.parameters())
    means, logvars = bias.chunk(2)
    rows = torch.cat([std, torch.ones_like(std)])
    _set(
        encoder,
        weight / rows[:, None, None, None],
        torch.cat([(means - mean) / std, logvars - 2 * std.log()]),
    )
    weight, bias = (p.cpu().double() for p in decoder.parameters())
    _set(decoder, weight * std[None, :, None, None], bias + weight[:, :, 0, 0] @ mean)


def _set(conv: nn.Conv2d, *values: Tensor) -> None:
    for parameter, value in zip(conv.parameters(), values, strict=True):
        parameter.copy_(value)
