"""A plain diffusers folder: `config.json` and safetensors, readable without latentae.

Our state-dict keys are diffusers' own, so weights are copied. The config has exactly the keys of
diffusers' class: an extra key would cause a warning at every load.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from latentae.errors import ModelError
from latentae.files import write_json
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.pretrained import CONFIG, WEIGHTS, save_weights

__all__ = ["Exportable", "ExportableConfig", "check_finite", "component_config", "write_diffusers"]

Exportable = AutoencoderKL | AutoencoderDC
ExportableConfig = AutoencoderKLConfig | AutoencoderDCConfig

VARIANTS = {"fp16": torch.float16, "bf16": torch.bfloat16}
TILE = 256  # diffusers takes sample_size for its tile side: small tiles are slow and show seams


def component_config(
    config: ExportableConfig,
    *,
    resolution: int,
    scaling_factor: float,
    shift_factor: float,
    force_upcast: bool = True,
) -> ExportableConfig:
    """The config that pipelines read: the model's own with the latent scaling and the tile side.

    `sample_size` is the training resolution, at least TILE, rounded up to a multiple of f.
    `force_upcast` is false only if fp16 was measured to be safe. diffusers' AutoencoderDC has no
    shift, tile side or `force_upcast`.
    """
    if isinstance(config, AutoencoderDCConfig):
        values = {"scaling_factor": scaling_factor, "sample_size": resolution}
        return config.model_copy(update={**values, "bottleneck": "deterministic"})
    f = config.downsampling
    values = {
        "sample_size": -(-max(resolution, TILE) // f) * f,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "force_upcast": force_upcast,
    }
    return AutoencoderKLConfig(**{**config.model_dump(), **values})


def check_finite(state: Mapping[str, Tensor], variant: str | None = None) -> None:
    """Check that all weights are finite in fp32 and in the dtype of a variant.

    Raises:
        ModelError: names the first tensor that is not.
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
    """Write `config.json`, the fp32 weights and, for a variant, the half-precision weights."""
    state = model.state_dict()
    save_weights(state, folder / WEIGHTS, torch.float32)
    if variant is not None:
        stem, suffix = WEIGHTS.rsplit(".", 1)
        save_weights(state, folder / f"{stem}.{variant}.{suffix}", VARIANTS[variant])
    write_json(folder / CONFIG, config.diffusers_dict())
