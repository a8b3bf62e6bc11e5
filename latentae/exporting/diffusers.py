"""A plain diffusers folder of an AutoencoderKL or AutoencoderDC: `config.json` and safetensors, no trace of us in either.

State-dict keys are already diffusers' own, so the weights are copied. The config has exactly the keys of diffusers' class: an
extra one would warn at every load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentae.errors import ModelError
from latentae.exporting.kinds import Exportable, ExportableConfig
from latentae.files import write_json
from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig
from latentae.models.pretrained import CONFIG, WEIGHTS, save_weights

__all__ = ["TILE", "VARIANTS", "check_finite", "component_config", "write_diffusers"]

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
TILE = 256  # diffusers takes sample_size for its tile side: a small one makes tiled decoding slow and full of seams


def component_config(
    config: ExportableConfig,
    *,
    resolution: int,
    scaling_factor: float,
    shift_factor: float,
    force_upcast: bool = True,
) -> ExportableConfig:
    """The config a pipeline reads: the model's own, with the latent scaling and the tile side filled in.

    `sample_size` becomes the training resolution, but no less than TILE, in whole latent pixels; `force_upcast` is false only where
    it was measured that fp16 activations do not overflow. diffusers' AutoencoderDC knows the scaling factor alone.
    """
    if isinstance(config, AutoencoderDCConfig):
        return config.model_copy(
            update={
                "scaling_factor": scaling_factor,
                "sample_size": resolution,
                "bottleneck": "deterministic",
            }
        )
    f = config.downsampling
    values = {
        "sample_size": -(-max(resolution, TILE) // f) * f,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "force_upcast": force_upcast,
    }
    return AutoencoderKLConfig(**{**config.model_dump(), **values})


def check_finite(state: Mapping[str, Tensor], variant: str | None = None) -> None:
    """Refuse weights that are not finite, in fp32 or in the type of a variant.

    Raises:
        ModelError: the first one is named.
    """
    for dtype in filter(None, (torch.float32, VARIANTS.get(variant or ""))):
        for name, value in state.items():
            if not value.to(dtype).isfinite().all():
                raise ModelError(
                    f"{name} has values that are not finite in {dtype}; export a healthy checkpoint"
                )


def write_diffusers(
    model: Exportable, config: ExportableConfig, folder: Path, variant: str | None = None
) -> None:
    """Write `config.json` and the fp32 weights, and the same weights once more in half precision where a variant is asked for."""
    state = model.state_dict()
    save_weights(state, folder / WEIGHTS, torch.float32)
    if variant is not None:
        stem, suffix = WEIGHTS.rsplit(".", 1)
        save_weights(state, folder / f"{stem}.{variant}.{suffix}", VARIANTS[variant])
    write_json(folder / CONFIG, config.diffusers_dict())
