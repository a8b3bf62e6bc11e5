"""Weights to begin a training with, from any file that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from latentae.errors import some
from latentae.file_names import DISCRIMINATOR
from latentae.models.architectures import build
from latentae.models.config import AutoencoderConfig
from latentae.models.ldm import discriminator_from_ldm, ldm_prefix
from latentae.models.pretrained import TRAINING, ModelSource, fitting_state, read_tensors, resolve_model

__all__ = ["InitialWeights", "load_discriminator", "load_initial"]


@dataclass(frozen=True)
class InitialWeights:
    """Where a training begins."""

    config: AutoencoderConfig
    state: dict[str, Tensor]
    """The autoencoder's state dict, in fp32."""
    discriminator: dict[str, Tensor] | None
    """The state dict of a discriminator that came with it; `load_discriminator` says whether it fits."""
    fingerprint: str
    """Equal fingerprints give equal weights."""


def load_initial(path: str | Path) -> InitialWeights:
    """The EMA weights of a run or checkpoint, a diffusers folder, a repository on the Hub, or a file of weights (see `resolve_model`).

    The discriminator is that of the run, of the export's `training/`, or of the LDM file, where there is one.

    Raises:
        ModelError: no such model, or one that is damaged, incomplete or of another family.
    """
    source = resolve_model(path)
    tensors = read_tensors(source.weights_file)
    discriminator = next((read_tensors(f) for f in _discriminator_files(source) if f.is_file()), None)
    if discriminator is None and ldm_prefix(tensors) is not None:
        discriminator = discriminator_from_ldm(tensors, source.weights_file)
    with torch.device("meta"):
        model = build(source.config)
    state = fitting_state(model, tensors, source.weights_file)
    return InitialWeights(
        source.config, _wide(state), discriminator and _wide(discriminator), source.fingerprint
    )


def _discriminator_files(source: ModelSource) -> list[Path]:
    """Where the network that a model was trained against may lie: in its checkpoint, or beside an export."""
    if source.kind in ("run", "checkpoint"):
        return [source.weights_file.with_name(DISCRIMINATOR)]
    return [source.weights_file.parent / TRAINING / DISCRIMINATOR] if source.kind == "folder" else []


def _wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float().contiguous() for key, value in state.items()}


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Copy `state` into a discriminator if it fits: the same keys and shapes. What doesn't fit, in words, or None if it was copied."""
    expected = module.state_dict()
    missing, unknown = [k for k in expected if k not in state], [k for k in state if k not in expected]
    if missing:
        return f"it lacks {some(missing)}"
    if unknown:
        return f"it has unknown {some(unknown)}"
    for key, value in expected.items():
        if state[key].shape != value.shape:
            return f"its {key} has shape {tuple(state[key].shape)}, this discriminator's {tuple(value.shape)}"
    module.load_state_dict(state)
    return None
