"""Finding, loading and saving the weights of an autoencoder.

exported folder   config.json, diffusion_pytorch_model.safetensors          (diffusers' own names), or config.json, vae.ldm.safetensors
diffusers folder  the same; or shards with an index, .bin, or a half-precision variant where there is nothing else
checkpoint        config.json, {ema,autoencoder}.safetensors, meta.json
run folder        checkpoints/latest -> the name of one of checkpoints/step-*, metrics.jsonl
file              .safetensors, pickled, or an index of shards: LDM's names or diffusers', with or without config.json in its folder
owner/name        a repository on the Hub that holds an exported folder, or one as `vae/`
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentae.errors import ImageError, ModelError, some
from latentae.file_names import METRICS_LOG, RECORD
from latentae.files import atomic_file, read_json, sha256, write_json
from latentae.models.architectures import build
from latentae.models.base import Autoencoder
from latentae.models.config import AutoencoderConfig, AutoencoderKLConfig, read_config
from latentae.models.hub import hub_id, snapshot
from latentae.models.ldm import from_ldm, infer_config, ldm_prefix, renamed_to_ldm
from latentae.models.pickled import PICKLES
from latentae.models.weight_files import (
    is_weights_file,
    note_left_out,
    prefix_before,
    read_tensors,
    split_unknown,
    weight_parts,
)
from latentae.progress import note

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "LATEST",
    "LDM_WEIGHTS",
    "META",
    "TRAINING",
    "WEIGHTS",
    "ModelSource",
    "fitting_state",
    "folder_weights",
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
CHECKPOINTS, LATEST, META = "checkpoints", "latest", "meta.json"
LDM_WEIGHTS, TRAINING = "vae.ldm.safetensors", "training"  # of an exported folder
CHECKPOINT_WEIGHTS = {"ema": "ema.safetensors", "raw": "autoencoder.safetensors"}

_DIFFUSERS_MARK = "encoder.mid_block.resnets.0.conv1.weight"
_FOLDERS = ("", "vae/")  # of the model itself, or of a pipeline

# What holds the weights in a diffusers folder, by patterns, from the best to the last resort; "*" in a name is a variant such as fp16.
_STEM = "diffusion_pytorch_model"
_WEIGHTS = (
    (WEIGHTS, f"{WEIGHTS}.index.json"),
    (LDM_WEIGHTS,),
    (f"{_STEM}.bin", f"{_STEM}.bin.index.json"),
    (f"{_STEM}.*.safetensors", f"{_STEM}.*safetensors.index*.json"),
    (f"{_STEM}.*.bin", f"{_STEM}.*bin.index*.json"),
)
_VARIANTS = 3  # of these, the first that is a variant
_SHARD = re.compile(r"-\d+-of-\d+\.")
# What is fetched from the Hub, row by row, until there are weights.
_HUB_FILES = (
    (CONFIG, RECORD, WEIGHTS, LDM_WEIGHTS),
    (f"{WEIGHTS}.index.json", f"{_STEM}-*.safetensors"),
    (f"{_STEM}.bin", f"{_STEM}.bin.index.json", f"{_STEM}-*.bin"),
    (f"{_STEM}.*.safetensors", f"{_STEM}.*index*.json"),
    (f"{_STEM}.*.bin",),
)

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

    def check_side(self, side: int) -> None:
        """Check that the model takes square images of `side` pixels.

        Raises:
            ImageError: `side` is not a positive multiple of f.
        """
        f = self.config.downsampling
        if side < 1 or side % f:
            use = max(round(side / f), 1) * f
            raise ImageError(f"resolution is {side}, {self.path} needs a multiple of {f}; use {use}")

    def check_channels(self, *, decodes: bool = True) -> None:
        """Check that image files have the model's channels: 1, 3 or 4, and as many out as in if it `decodes`.

        Raises:
            ModelError: other channels.
        """
        found, out = self.config.in_channels, self.config.out_channels
        if found not in (1, 3, 4):
            raise ModelError(
                f"{self.path} takes {found} channels, image files have 1, 3 or 4; call the model on tensors"
            )
        if decodes and out != found:
            raise ModelError(f"{self.path} has {found} channels in and {out} out, expected the same number")


def resolve_model(path: str | Path, weights: str = "ema") -> ModelSource:
    """Find config and weights behind a run folder, checkpoint, exported folder, file of weights or name of a repository on the Hub.

    A file may be .safetensors, .ckpt, .pt, .pth, .bin or an index of shards. Its names are diffusers' or LDM's, with or without a prefix
    such as "first_stage_model." or "module."; its shape is that of the config.json in its folder, or what the tensors say. Pickled files
    are read as tensors and run no code. In a diffusers folder full precision is preferred to a variant, and safetensors to .bin. What is
    no path here and reads `owner/name` is looked for on the Hub.

    Raises:
        ModelError: `path` is none of these, or a part is missing.
    """
    if weights not in CHECKPOINT_WEIGHTS:
        raise ModelError(f"weights is {weights!r}, expected 'ema' or 'raw'")
    name = hub_id(path)
    path = Path(path) if name is None else _fetched(name)
    if not path.exists():
        raise ModelError(
            f"{path} does not exist; give a run folder, a checkpoint, an exported folder, a file of weights or owner/name on the Hub"
        )
    if path.is_file():
        if not is_weights_file(path):
            raise ModelError(
                f"{path} is no file of weights; expected .safetensors, {', '.join(PICKLES)} or an index of shards"
            )
        return _source(path, path, path.with_name(CONFIG), "file")
    latest = path / CHECKPOINTS / LATEST
    if latest.is_file():
        checkpoint = path / CHECKPOINTS / latest.read_text(encoding="utf-8").strip()
        log = path / METRICS_LOG
        return _source(
            path,
            checkpoint / CHECKPOINT_WEIGHTS[weights],
            checkpoint / CONFIG,
            "run",
            log if log.is_file() else None,
        )
    if (path / CHECKPOINTS).is_dir():
        raise ModelError(
            f"{path} is a run without a finished checkpoint yet; let it train on, or give another model"
        )
    if (path / META).is_file():
        return _source(path, path / CHECKPOINT_WEIGHTS[weights], path / CONFIG, "checkpoint")
    file = folder_weights(path)
    if file is not None:
        return _source(path, file, file.with_name(CONFIG), "folder")
    where = f"{name} on the Hub" if name else str(path)
    others = sorted(file.name for file in path.iterdir() if is_weights_file(file))
    advice = f"; it has {some(others)}: give one of these files itself" if others else ""
    raise ModelError(
        f"{where} holds no model: expected {WEIGHTS}, a checkpoint's {META} or a run's {CHECKPOINTS}/{LATEST}{advice}"
    )


def folder_weights(path: Path) -> Path | None:
    """The file of weights, or the index of shards, in a diffusers folder or the `vae/` of a pipeline; None if there is none.

    Raises:
        ModelError: several files are equally good.
    """
    for row, patterns in enumerate(_WEIGHTS):
        for folder in _FOLDERS:
            files = {file for pattern in patterns for file in (path / folder).glob(pattern)}
            found = sorted(file for file in files if file.is_file() and not _SHARD.search(file.name))
            if len(found) > 1:
                raise ModelError(
                    f"{path / folder} holds {some([file.name for file in found])}; give the file that you want"
                )
            if found and row >= _VARIANTS:
                note(f"{found[0]}: its folder has no weights in full precision, so this variant is read")
            if found:
                return found[0]
    return None


def _fetched(name: str) -> Path:
    """The folder of a repository on the Hub with the first kind of weights that it has."""
    folder = Path()
    for patterns in _HUB_FILES:
        folder = snapshot(name, [f"{part}{pattern}" for part in _FOLDERS for pattern in patterns])
        if folder_weights(folder) is not None:
            break
    return folder


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
    elif kind == "folder" and (weights_file.with_name(RECORD)).is_file():
        # an export's sample_size is diffusers' tile size, not what the model was trained at
        resolution = int(
            read_json(weights_file.with_name(RECORD)).get("inputs", {}).get("resolution", resolution)
        )
    return ModelSource(
        path, weights_file, config, kind, resolution, weights_fingerprint(weights_file, config), log
    )


def weights_fingerprint(file: Path, config: AutoencoderConfig) -> str:
    """Hex digest of a file of weights, or of all shards of an index, and the config it is read with."""
    digests = "".join(sha256(part) for part in weight_parts(file))
    return hashlib.sha256((digests + config.model_dump_json()).encode()).hexdigest()


def inferred_config(file: Path, tensors: Mapping[str, Tensor]) -> AutoencoderKLConfig:
    """The shape of the autoencoder in a file of weights without config, from its tensors.

    Tensors do not tell the number of groups in a norm. LDM knows no other than 32; under diffusers' names 32 is taken too, and said.

    Raises:
        ModelError: `tensors` are not those of an autoencoder that this library has.
    """
    with _naming(file):
        if ldm_prefix(tensors) is not None:
            return infer_config(tensors)
        current = _unprefixed(_current(tensors), _DIFFUSERS_MARK)[1]
    if _DIFFUSERS_MARK not in current:
        raise ModelError(
            f"{file} has no {CONFIG} beside it, and its tensors are not those of an AutoencoderKL; put its {CONFIG} there"
        )
    with _naming(file):
        config = infer_config(renamed_to_ldm(current))
    note(
        f"{file}: no {CONFIG} beside it; its shape was read from the tensors, norms taken to have {config.norm_num_groups} groups"
    )
    return config


def fitting_state(model: Autoencoder, tensors: Mapping[str, Tensor], file: str | Path) -> dict[str, Tensor]:
    """The content of `file` as a state dict of `model` (which may be on the meta device: only shapes are read).

    Names may be LDM's, or those that diffusers used until 2023, behind any prefix. The log names tensors that a training left in the
    file, and other components of it.

    Raises:
        ModelError: a key, shape or type does not fit, or a tensor is unknown; the first ones are named.
    """
    expected = model.state_dict()
    with _naming(file):
        if isinstance(model.config, AutoencoderKLConfig) and ldm_prefix(tensors) is not None:
            state = from_ldm(tensors, model.config, file)
        else:
            current = _current(tensors)
            prefix, state = _unprefixed(current, max(expected, key=len))
            _check_shapes(model, state)
            unknown, harmless = split_unknown(current, {prefix + key for key in expected}, prefix)
            missing = [key for key in expected if key not in state]
            if missing or unknown:
                what = f"it lacks {some(missing)}" if missing else f"it has unknown {some(unknown)}"
                raise ModelError(f"{what}; the weights and config.json belong to different models")
            note_left_out(file, harmless)
            state = {key: state[key] for key in expected}
        for key, value in state.items():
            if expected[key].is_floating_point() and not value.is_floating_point():
                raise ModelError(
                    f"{key} has type {value.dtype}, expected floating point; give weights that are not quantized"
                )
    return state


def _current(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under today's names of diffusers."""
    return {_current_name(key): _as_current(key, value) for key, value in tensors.items()}


def _unprefixed(tensors: Mapping[str, Tensor], mark: str) -> tuple[str, dict[str, Tensor]]:
    """What is before the autoencoder's keys, of which `mark` is one, and the tensors behind it."""
    prefix = prefix_before(tensors, mark) or ""
    return prefix, {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _check_shapes(model: Autoencoder, state: Mapping[str, Tensor]) -> None:
    expected = model.state_dict()
    wrong = [k for k in expected if k in state and state[k].shape != expected[k].shape]
    if wrong:
        key = next(
            (k for k in wrong if k.startswith(("quant_conv", "post_quant_conv", "decoder.conv_in"))), wrong[0]
        )
        hint = (
            f"; the config says latent_channels = {model.config.latent_channels}"
            if key != wrong[0] or "quant" in key
            else ""
        )
        raise ModelError(
            f"{key} has shape {tuple(state[key].shape)}, the model expects {tuple(expected[key].shape)}{hint}"
        )


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
    return (
        value[:, :, 0, 0] if "attentions" in key and value.ndim == 4 and value.shape[2:] == (1, 1) else value
    )


def load_model(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
) -> tuple[Autoencoder, ModelSource]:
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
