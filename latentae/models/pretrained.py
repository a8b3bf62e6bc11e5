"""Finding, loading and saving the weights of an autoencoder.

exported folder   config.json, diffusion_pytorch_model.safetensors          (diffusers' own names), or config.json, vae.ldm.safetensors
checkpoint        config.json, {ema,autoencoder}.safetensors, meta.json
run folder        checkpoints/latest -> the name of one of checkpoints/step-*, metrics.jsonl
file              .safetensors, or pickled: LDM's names or diffusers', with a config.json beside it or without
owner/name        a repository on the Hub that holds an exported folder, or one as `vae/`
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from latentae.errors import ModelError
from latentae.files import atomic_file, read_json, sha256, write_json
from latentae.models.architectures import build
from latentae.models.base import Autoencoder
from latentae.models.config import AutoencoderConfig, AutoencoderKLConfig, read_config
from latentae.models.hub import hub_id, snapshot
from latentae.models.ldm import from_ldm, infer_config, ldm_prefix, renamed_to_ldm
from latentae.models.pickled import PICKLES, read_pickle
from latentae.progress import say

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "LATEST",
    "LDM_WEIGHTS",
    "META",
    "METRICS_LOG",
    "TRAINING",
    "WEIGHTS",
    "ModelSource",
    "fitting_state",
    "inferred_config",
    "load_model",
    "load_weights",
    "read_tensors",
    "resolve_model",
    "save_model",
    "save_weights",
    "weights_fingerprint",
]

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CHECKPOINTS, LATEST, META, METRICS_LOG = "checkpoints", "latest", "meta.json", "metrics.jsonl"
LDM_WEIGHTS, TRAINING = "vae.ldm.safetensors", "training"  # of an exported folder
PROVENANCE = "latentae.json"
CHECKPOINT_WEIGHTS = {"ema": "ema.safetensors", "raw": "autoencoder.safetensors"}

_DIFFUSERS_MARK = "encoder.mid_block.resnets.0.conv1.weight"
_HUB_FILES = tuple(f"{folder}{name}" for folder in ("", "vae/") for name in (CONFIG, WEIGHTS, LDM_WEIGHTS, PROVENANCE))

# diffusers wrote attention layers under these names until 2023; its oldest VAE folders still have them.
_DEPRECATED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    Attributes:
        path: as given by the user, or the folder that the Hub's client put it in.
        weights_file: the file of weights.
        config: the model's shape.
        kind: what `path` is.
        resolution: image side in pixels it was trained at, or the config's sample_size.
        fingerprint: hex digest of the weights file and the config; equal fingerprints give equal outputs.
        metrics_log: the run's metrics.jsonl if there is one.
    """

    path: Path
    weights_file: Path
    config: AutoencoderConfig
    kind: Literal["run", "checkpoint", "folder", "file"]
    resolution: int
    fingerprint: str
    metrics_log: Path | None = None


def resolve_model(path: str | Path, weights: str = "ema") -> ModelSource:
    """Find config and weights behind a run folder, checkpoint, exported folder, file of weights or name of a repository on the Hub.

    A file may be .safetensors, .ckpt, .pt, .pth or .bin, and its names diffusers' or LDM's, with the prefixes "",
    "first_stage_model." and "vae."; its shape is that of the config.json beside it, or what the tensors say. Pickled files are read
    as tensors only: one that wants more of Python is refused. What is no path here and reads `owner/name` is looked for on the Hub.

    Raises:
        ModelError: `path` is none of these, or a part is missing.
    """
    if weights not in CHECKPOINT_WEIGHTS:
        raise ModelError(f"weights is {weights!r}, expected 'ema' or 'raw'")
    name = hub_id(path)
    path = Path(path) if name is None else snapshot(name, _HUB_FILES)
    if not path.exists():
        raise ModelError(
            f"{path} does not exist; give a run folder, a checkpoint, an exported folder, a file of weights or owner/name on the Hub"
        )
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLES):
            raise ModelError(f"{path} is no file of weights; expected .safetensors, {', '.join(PICKLES)}")
        return _source(path, path, path.with_name(CONFIG), "file")
    latest = path / CHECKPOINTS / LATEST
    if latest.is_file():
        checkpoint = path / CHECKPOINTS / latest.read_text(encoding="utf-8").strip()
        log = path / METRICS_LOG
        return _source(path, checkpoint / CHECKPOINT_WEIGHTS[weights], checkpoint / CONFIG, "run", log if log.is_file() else None)
    if (path / CHECKPOINTS).is_dir():
        raise ModelError(f"{path} is a run without a finished checkpoint yet; let it train on, or give another model")
    if (path / META).is_file():
        return _source(path, path / CHECKPOINT_WEIGHTS[weights], path / CONFIG, "checkpoint")
    for file in (path / WEIGHTS, path / "vae" / WEIGHTS, path / LDM_WEIGHTS, path / "vae" / LDM_WEIGHTS):
        if file.is_file():
            return _source(path, file, file.with_name(CONFIG), "folder")
    where = f"{name} on the Hub" if name else str(path)
    raise ModelError(f"{where} holds no model: expected {WEIGHTS}, a checkpoint's {META} or a run's {CHECKPOINTS}/{LATEST}")


def _source(
    path: Path,
    weights_file: Path,
    config_file: Path,
    kind: Literal["run", "checkpoint", "folder", "file"],
    log: Path | None = None,
) -> ModelSource:
    if not weights_file.is_file():
        raise ModelError(f"{path} has no {weights_file.name}; the {kind} is incomplete, use another one")
    if kind == "file" and not config_file.exists():
        config = inferred_config(weights_file, read_tensors(weights_file))
    else:
        config = read_config(config_file)
    size = config.sample_size
    resolution = size if isinstance(size, int) else min(size)
    if kind in ("run", "checkpoint"):
        resolution = int(read_json(weights_file.with_name(META)).get("resolution", resolution))
    elif kind == "folder" and (weights_file.with_name(PROVENANCE)).is_file():
        # an export's sample_size is diffusers' tile size, not what the model was trained at
        resolution = int(read_json(weights_file.with_name(PROVENANCE)).get("inputs", {}).get("resolution", resolution))
    return ModelSource(path, weights_file, config, kind, resolution, weights_fingerprint(weights_file, config), log)


def weights_fingerprint(file: Path, config: AutoencoderConfig) -> str:
    """Hex digest of a file of weights and the config it is read with."""
    return hashlib.sha256((sha256(file) + config.model_dump_json()).encode()).hexdigest()


def inferred_config(file: Path, tensors: Mapping[str, Tensor]) -> AutoencoderKLConfig:
    """The shape of the autoencoder in a file of weights without config, from its tensors.

    Tensors do not tell the number of groups in a norm. LDM knows no other than 32; under diffusers' names 32 is taken too, and said.

    Raises:
        ModelError: `tensors` are not those of an autoencoder that this library has.
    """
    if ldm_prefix(tensors) is not None:
        with _naming(file):
            return infer_config(tensors)
    current = {_current_name(key): value for key, value in tensors.items()}
    if _DIFFUSERS_MARK not in current:
        raise ModelError(
            f"{file} has no {CONFIG} beside it, and its tensors are not those of an AutoencoderKL; put its {CONFIG} there"
        )
    with _naming(file):
        config = infer_config(renamed_to_ldm(current))
    say(
        f"{file}: no {CONFIG} beside it; its shape was read from the tensors, norms taken to have {config.norm_num_groups} groups"
    )
    return config


def read_tensors(file: str | Path) -> dict[str, Tensor]:
    """Everything in a file of weights; of a pickled one its tensors, without running any code.

    Raises:
        ModelError: it is damaged or can't be read.
    """
    if Path(file).suffix in PICKLES:
        return read_pickle(file)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"could not read {file} ({error}); the file is damaged, use another copy") from error


def fitting_state(model: Autoencoder, tensors: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The content of `file` as a state dict of `model` (which may be on the meta device: only shapes are read).

    Names may be LDM's, or those that diffusers used until 2023.

    Raises:
        ModelError: a key or shape does not fit; the first one is named.
    """
    if isinstance(model.config, AutoencoderKLConfig) and ldm_prefix(tensors) is not None:
        with _naming(file):
            return from_ldm(tensors, model.config)
    state = {_current_name(key): _as_current(key, value) for key, value in tensors.items()}
    expected = model.state_dict()
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if wrong:
        key = next((k for k in wrong if k.startswith(("quant_conv", "post_quant_conv", "decoder.conv_in"))), wrong[0])
        hint = f"; the config says latent_channels = {model.config.latent_channels}" if key != wrong[0] or "quant" in key else ""
        raise ModelError(
            f"{file}: {key} has shape {tuple(state[key].shape)}, the model expects {tuple(expected[key].shape)}{hint}"
        )
    missing, unknown = [k for k in expected if k not in state], [k for k in state if k not in expected]
    if missing or unknown:
        what = (
            f"lacks {missing[0]} (and {len(missing) - 1} more)"
            if missing
            else f"has unknown {unknown[0]} (and {len(unknown) - 1} more)"
        )
        raise ModelError(f"{file} {what}; the weights and config.json belong to different models")
    return state


def load_weights(model: Autoencoder, file: str | Path) -> None:
    """Copy a file of weights into `model`.

    Raises:
        ModelError: the file is damaged, or a key or shape does not fit.
    """
    model.load_state_dict(fitting_state(model, read_tensors(file), file))


@contextmanager
def _naming(file: str | Path) -> Iterator[None]:
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def _current_name(key: str) -> str:
    for old, new in _DEPRECATED.items():
        if "attentions" in key and old in key:
            return key.replace(old, new)
    return key


def _as_current(key: str, value: Tensor) -> Tensor:
    """Attention layers stored as 1x1 convolutions (LDM's way) become linear ones."""
    return value[:, :, 0, 0] if "attentions" in key and value.ndim == 4 else value


def load_model(path: str | Path, weights: str = "ema", device: str | torch.device = "cpu") -> tuple[Autoencoder, ModelSource]:
    """The model behind `path` in evaluation mode, channels_last, fp32, and where it came from.

    Raises:
        ModelError: see `resolve_model` and `load_weights`.
    """
    source = resolve_model(path, weights)
    model = build(source.config)
    load_weights(model, source.weights_file)
    return model.to(device).eval(), source


def save_weights(state: dict[str, Tensor], file: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors atomically, plain contiguous, so that equal weights give equal bytes in any memory format."""
    plain = {
        key: value.detach()
        .to("cpu", dtype if value.is_floating_point() else None)
        .contiguous(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    with atomic_file(file) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def save_model(model: Autoencoder, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write diffusers' `config.json` and weights file into `folder`."""
    folder = Path(folder)
    save_weights(model.state_dict(), folder / WEIGHTS, dtype)
    write_json(folder / CONFIG, model.config.diffusers_dict())
