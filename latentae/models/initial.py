"""Weights to begin a training with, from any file that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig
from latentae.models.ldm import discriminator_from_ldm, ldm_prefix
from latentae.models.pretrained import CONFIG, fitting_state, ldm_config, read_tensors, resolve_model, weights_fingerprint

__all__ = ["InitialWeights", "load_discriminator", "load_initial"]

DISCRIMINATOR = "discriminator.safetensors"
_PICKLES = (".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class InitialWeights:
    """Where a training begins."""

    config: AutoencoderKLConfig
    state: dict[str, Tensor]
    """AutoencoderKL's state dict, in fp32."""
    discriminator: dict[str, Tensor] | None
    """The state dict of a discriminator that came with it; `load_discriminator` says whether it fits."""
    fingerprint: str
    """Equal fingerprints give equal weights."""


def load_initial(path: str | Path) -> InitialWeights:
    """The EMA weights of a run or checkpoint, a diffusers folder, or a file of weights.

    A file may be .safetensors, .ckpt, .pt or .pth, and its names diffusers' or LDM's, with the prefixes "", "first_stage_model." and
    "vae."; its shape is that of the config.json beside it or, for LDM's names, what the tensors say. Pickled files are read as tensors
    only: one that wants more of Python is refused.

    Raises:
        ModelError: no such model, or one that is damaged, incomplete or of another family.
    """
    path = Path(path)
    if path.is_file() and path.suffix in _PICKLES:
        return _from_pickle(path)
    source = resolve_model(path)
    tensors, discriminator = read_tensors(source.weights_file), None
    beside = source.weights_file.with_name(DISCRIMINATOR)
    if source.kind in ("run", "checkpoint") and beside.is_file():
        discriminator = read_tensors(beside)
    elif ldm_prefix(tensors) is not None:
        discriminator = discriminator_from_ldm(tensors)
    return _weights(source.config, tensors, discriminator, source.weights_file)


def _from_pickle(file: Path) -> InitialWeights:
    tensors = _unpickle(file)
    beside = file.with_name(CONFIG)
    config = AutoencoderKLConfig.from_json(beside) if beside.exists() else ldm_config(file, tensors)
    return _weights(config, tensors, discriminator_from_ldm(tensors), file)


def _weights(
    config: AutoencoderKLConfig, tensors: dict[str, Tensor], discriminator: dict[str, Tensor] | None, file: Path
) -> InitialWeights:
    with torch.device("meta"):
        model = AutoencoderKL(config)
    state = fitting_state(model, tensors, file)
    return InitialWeights(config, _wide(state), discriminator and _wide(discriminator), weights_fingerprint(file, config))


def _unpickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled checkpoint, read by torch's restricted unpickler, which runs no code."""
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile file can make the unpickler fail in any way
        raise ModelError(
            f"could not read {file} as plain tensors ({type(error).__name__}: {_first_sentence(error)}); it is damaged or asks for "
            "more of Python than that, which is refused: use a .safetensors copy"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ModelError(f"{file} holds a {type(content).__name__}, expected a dict of tensors, or one under 'state_dict'")
    return {key: value for key, value in content.items() if isinstance(key, str) and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether this is a tensor that owns all of its values; a file can also claim terabytes by a stride of zero."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split()).partition(". ")[0]
    return text if len(text) < 200 else text[:200] + "..."


def _wide(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float().contiguous() for key, value in state.items()}


def load_discriminator(module: nn.Module, state: dict[str, Tensor]) -> str | None:
    """Copy `state` into a discriminator if it fits: the same keys and shapes. What doesn't fit, in words, or None if it was copied."""
    expected = module.state_dict()
    missing, unknown = [k for k in expected if k not in state], [k for k in state if k not in expected]
    if missing:
        return f"it lacks {missing[0]} (and {len(missing) - 1} more)"
    if unknown:
        return f"it has an unknown {unknown[0]} (and {len(unknown) - 1} more)"
    for key, value in expected.items():
        if state[key].shape != value.shape:
            return f"its {key} has shape {tuple(state[key].shape)}, this discriminator's {tuple(value.shape)}"
    module.load_state_dict(state)
    return None
