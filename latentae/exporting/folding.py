"""The latents' normalisation as part of the weights, so that a pipeline has nothing left to scale or shift.

    latents    n = (z - mean) / std per channel, what a diffusion model sees
    encoder    the 1x1 convolution after it gives n's mean and log-variance: rows W / std, b = (b - mean) / std; log-variance b - 2 log std
    decoder    the 1x1 convolution before it takes n: W diag(std), b + W mean

Exact but for rounding, and for log-variances that the clamp to [-30, 20] cuts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latentae.errors import RecipeError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig

__all__ = ["fold_normalization"]


def fold_normalization(
    model: AutoencoderKL, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
) -> AutoencoderKL:
    """A copy of `model` whose latents have the given statistics removed; its config says scaling 1 and shift 0.

    A 1x1 convolution that the model has not is added as the identity first. Posterior: N((m - mean) / std, (s / std)^2) where the
    model's own is N(m, s^2). Decoder: `decode(n)` is what the model makes of n * std + mean.

    Args:
        model: left as it is; the copy has its type, device and mode.
        mean: of the raw latents by channel, [z].
        std: standard deviation of the raw latents by channel, [z], positive.

    Raises:
        RecipeError: not one finite number for each latent channel, or a standard deviation that is not positive.
    """
    z = model.config.latent_channels
    shift, scale = (torch.as_tensor(values, dtype=torch.float64).flatten().cpu() for values in (mean, std))
    if not len(shift) == len(scale) == z:
        raise RecipeError(
            f"mean and std have {len(shift)} and {len(scale)} numbers, the model has {z} latent channels"
        )
    if not (shift.isfinite().all() and scale.isfinite().all() and (scale > 0).all()):
        raise RecipeError(
            "a latent channel's mean is not finite or its std not positive; a channel that never varies can't be normalised, "
            "export without folding"
        )
    folded = AutoencoderKL(folded_config(model.config))
    folded.load_state_dict({**_identities(z), **copy.deepcopy(model.state_dict())})
    example = next(model.parameters())
    folded.to(example.device, example.dtype).train(model.training)
    assert folded.quant_conv is not None
    assert folded.post_quant_conv is not None
    _fold_encoder(folded.quant_conv, shift, scale)
    _fold_decoder(folded.post_quant_conv, shift, scale)
    return folded


def folded_config(config: AutoencoderKLConfig) -> AutoencoderKLConfig:
    """The config of the folded model: both 1x1 convolutions, and latents that are normalised already."""
    neutral = {"scaling_factor": 1.0, "shift_factor": 0.0, "latents_mean": None, "latents_std": None}
    return AutoencoderKLConfig(
        **{**config.model_dump(), **neutral, "use_quant_conv": True, "use_post_quant_conv": True}
    )


def _identities(z: int) -> dict[str, Tensor]:
    """Both 1x1 convolutions as the identity."""
    return {
        f"{name}.{part}": value
        for name, width in (("quant_conv", 2 * z), ("post_quant_conv", z))
        for part, value in (("weight", torch.eye(width)[:, :, None, None]), ("bias", torch.zeros(width)))
    }


def _fold_encoder(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    assert conv.bias is not None
    z = len(mean)
    weight, bias = conv.weight.detach().cpu().double(), conv.bias.detach().cpu().double()
    means = weight[:z] / std[:, None, None, None], (bias[:z] - mean) / std
    _set(conv, torch.cat([means[0], weight[z:]]), torch.cat([means[1], bias[z:] - 2 * std.log()]))


def _fold_decoder(conv: nn.Conv2d, mean: Tensor, std: Tensor) -> None:
    assert conv.bias is not None
    weight, bias = conv.weight.detach().cpu().double(), conv.bias.detach().cpu().double()
    _set(conv, weight * std[None, :, None, None], bias + weight[:, :, 0, 0] @ mean)


@torch.no_grad()
def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    assert conv.bias is not None
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
