"""A plain diffusers AutoencoderKL folder: `config.json` and safetensors, no trace of us in either.

State-dict keys are already diffusers' own, so the weights are copied. The config has exactly the keys of diffusers' class: an
extra one would warn at every load.
"""

from __future__ import annotations

from pathlib import Path

import torch

from latentae.errors import ModelError, RecipeError
from latentae.files import write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.pretrained import CONFIG, WEIGHTS, save_weights

__all__ = ["TILE", "VARIANTS", "component_config", "write_diffusers"]

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
TILE = 256  # diffusers takes sample_size for its tile side: a small one makes tiled decoding slow and full of seams


def component_config(
    config: AutoencoderKLConfig, *, resolution: int, scaling_factor: float, shift_factor: float
) -> AutoencoderKLConfig:
    """The config a pipeline reads: the model's own, with the latent scaling and the tile side filled in.

    `sample_size` becomes the training resolution, but no less than TILE, in whole latent pixels; `force_upcast` stays true, since
    nothing here has shown that fp16 activations do not overflow.
    """
    f = config.downsampling
    sample_size = -(-max(resolution, TILE) // f) * f
    values = {"sample_size": sample_size, "scaling_factor": scaling_factor, "shift_factor": shift_factor, "force_upcast": True}
    return AutoencoderKLConfig(**{**config.model_dump(), **values})


def write_diffusers(model: AutoencoderKL, config: AutoencoderKLConfig, folder: Path, variant: str | None = None) -> None:
    """Write `config.json` and the fp32 weights, and the same weights once more in half precision where a variant is asked for.

    Raises:
        ModelError: a weight is not finite, or does not fit the variant's type.
        RecipeError: unknown variant.
    """
    if variant is not None and variant not in VARIANTS:
        raise RecipeError(f"variant is {variant!r}, expected one of {', '.join(VARIANTS)}")
    state = model.state_dict()
    for dtype in filter(None, (torch.float32, VARIANTS.get(variant or ""))):
        for name, value in state.items():
            if not value.to(dtype).isfinite().all():
                raise ModelError(f"{name} has values that are not finite in {dtype}; export a healthy checkpoint")
    save_weights(state, folder / WEIGHTS, torch.float32)
    if variant is not None:
        stem, suffix = WEIGHTS.rsplit(".", 1)
        save_weights(state, folder / f"{stem}.{variant}.{suffix}", VARIANTS[variant])
    write_json(folder / CONFIG, config.diffusers_dict())
