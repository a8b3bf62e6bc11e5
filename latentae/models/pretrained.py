"""Find, load and save the weights of an autoencoder: MODEL -> source -> weights.

exported folder   config.json, diffusion_pytorch_model.safetensors (or vae.ldm.safetensors)
diffusers folder  the same; or shards with an index, .bin, or a variant such as fp16
checkpoint        config.json, {ema,autoencoder}.safetensors, meta.json
run folder        checkpoints/latest -> the name of one of checkpoints/step-*, metrics.jsonl
file              .safetensors, pickled, or an index of shards, with or without config.json
owner/name        a repository on the Hub that holds an exported folder, or one as `vae/`

`weight_files` reads the tensors of a file and `state_dicts` fits them to a model.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentae.errors import ImageError, MissingDependencyError, ModelError, first_line, some
from latentae.file_names import METRICS_LOG, RECIPE, RECORD
from latentae.files import atomic_file, read_json, sha256, write_json
from latentae.models.config import AutoencoderConfig, build, read_config
from latentae.models.pickled import PICKLES
from latentae.models.state_dicts import fitting_state, inferred_config
from latentae.models.weight_files import is_weights_file, read_tensors, weight_parts
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
    "folder_weights",
    "hub_id",
    "load_model",
    "load_weights",
    "resolve_model",
    "save_model",
    "save_weights",
    "snapshot",
]

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
CHECKPOINTS, LATEST, META = "checkpoints", "latest", "meta.json"
LDM_WEIGHTS, TRAINING = "vae.ldm.safetensors", "training"  # of an exported folder
CHECKPOINT_WEIGHTS = {"ema": "ema.safetensors", "raw": "autoencoder.safetensors"}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_FOLDERS = ("", "vae/")  # of the model itself, or of a pipeline

# Patterns of the weights in a diffusers folder, best first; "*" in a name is a variant such as
# fp16.
_STEM = "diffusion_pytorch_model"
_WEIGHTS = (
    (WEIGHTS, f"{WEIGHTS}.index.json"),
    (LDM_WEIGHTS,),
    (f"{_STEM}.bin", f"{_STEM}.bin.index.json"),
    (f"{_STEM}.*.safetensors", f"{_STEM}.*safetensors.index*.json"),
    (f"{_STEM}.*.bin", f"{_STEM}.*bin.index*.json"),
)
_VARIANTS = 3  # the first row of variants
_SHARD = re.compile(r"-\d+-of-\d+\.")
# Patterns that are downloaded from the Hub, row by row, until there are weights.
_HUB_FILES = (
    (CONFIG, RECORD, WEIGHTS, LDM_WEIGHTS),
    (f"{WEIGHTS}.index.json", f"{_STEM}-*.safetensors"),
    (f"{_STEM}.bin", f"{_STEM}.bin.index.json", f"{_STEM}-*.bin"),
    (f"{_STEM}.*.safetensors", f"{_STEM}.*index*.json"),
    (f"{_STEM}.*.bin",),
)

Kind = Literal["run", "checkpoint", "folder", "file"]


@dataclass(frozen=True)
class ModelSource:
    """The files of a model.

    Attributes:
        path: as given by the user, or the folder of the Hub's client.
        weights_file: the file of weights.
        config: the model's shape.
        kind: type of `path`.
        resolution: image side in pixels of its training, or the config's sample_size.
        fingerprint: hex digest of the weights file and the config; equal fingerprints give equal
            outputs.
        metrics_log: the run's metrics.jsonl if there is one.
    """

    path: Path
    weights_file: Path
    config: AutoencoderConfig
    kind: Kind
    resolution: int
    fingerprint: str
    metrics_log: Path | None = None

    def recipe(self) -> dict[str, Any] | None:
        """The resolved recipe of a run or checkpoint; None for other models."""
        for folder in (self.weights_file.parent, Path(self.path)):
            try:
                return tomllib.loads((folder / RECIPE).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
        return None

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
        """Check that image files have the model's channels: 1, 3 or 4, and equal ones out if it
        `decodes`.

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


def load_model(
    path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
) -> tuple[Any, ModelSource]:
    """The `Autoencoder` behind `path` in evaluation mode, channels_last, fp32, and its source.

    Raises:
        ModelError: see `resolve_model` and `load_weights`.
    """
    source = resolve_model(path, weights)
    model = build(source.config)
    load_weights(model, source.weights_file)
    return model.to(device).eval(), source


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Copy a file of weights into `model`.

    Raises:
        ModelError: the file is damaged, or a key or shape does not fit.
    """
    model.load_state_dict(fitting_state(model, read_tensors(file), file))


def resolve_model(path: str | Path, weights: str = "ema") -> ModelSource:
    """Find config and weights of a run folder, checkpoint, exported folder, file or Hub repository.

    A file may be .safetensors, .ckpt, .pt, .pth, .bin or an index of shards. Its names are
    diffusers' or LDM's, with or without a prefix such as "first_stage_model." or "module.". Its
    shape is that of the config.json in its folder, or is read from the tensors. Pickled files are
    read as tensors and run no code. In a diffusers folder full precision is preferred to a variant,
    and safetensors to .bin. A path that does not exist and reads `owner/name` is looked up on the
    Hub.

    Raises:
        ModelError: `path` is none of these, or a part is missing.
    """
    if weights not in CHECKPOINT_WEIGHTS:
        raise ModelError(f"weights is {weights!r}, expected 'ema' or 'raw'")
    name = hub_id(path)
    path = Path(path) if name is None else _downloaded(name)
    if not path.exists():
        raise ModelError(
            f"{path} does not exist; give a run folder, a checkpoint, an exported folder, a file of weights "
            "or owner/name on the Hub"
        )
    if path.is_file():
        if not is_weights_file(path):
            known = f".safetensors, {', '.join(PICKLES)} or an index of shards"
            raise ModelError(f"{path} is no file of weights; expected {known}")
        return _source(path, path, "file")
    if (path / CHECKPOINTS / LATEST).is_file():
        checkpoint = (path / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip()
        return _source(path, path / CHECKPOINTS / checkpoint / CHECKPOINT_WEIGHTS[weights], "run")
    if (path / CHECKPOINTS).is_dir():
        raise ModelError(f"{path} is a run without a finished checkpoint; train on, or give another model")
    if (path / META).is_file():
        return _source(path, path / CHECKPOINT_WEIGHTS[weights], "checkpoint")
    if file := folder_weights(path):
        return _source(path, file, "folder")
    others = sorted(file.name for file in path.iterdir() if is_weights_file(file))
    advice = f"; it has {some(others)}: give one of these files itself" if others else ""
    where = f"{name} on the Hub" if name else str(path)
    expected = f"{WEIGHTS}, a checkpoint's {META} or a run's {CHECKPOINTS}/{LATEST}"
    raise ModelError(f"{where} holds no model: expected {expected}{advice}")


def folder_weights(path: Path) -> Path | None:
    """The weights, or their index, in a diffusers folder or the `vae/` of a pipeline.

    Raises:
        ModelError: several files are equally good.
    """
    for row, patterns in enumerate(_WEIGHTS):
        for folder in _FOLDERS:
            files = {file for pattern in patterns for file in (path / folder).glob(pattern)}
            found = sorted(file for file in files if file.is_file() and not _SHARD.search(file.name))
            if len(found) > 1:
                names = some([file.name for file in found])
                raise ModelError(f"{path / folder} holds {names}; give the file that you want")
            if found and row >= _VARIANTS:
                note(f"{found[0]}: its folder has no weights in full precision, so this variant is read")
            if found:
                return found[0]
    return None


def _source(path: Path, weights_file: Path, kind: Kind) -> ModelSource:
    if not weights_file.is_file():
        raise ModelError(f"{path} has no {weights_file.name}; the {kind} is incomplete, use another one")
    config_file = weights_file.with_name(CONFIG)
    if kind == "file" and not config_file.exists():
        config = inferred_config(weights_file, read_tensors(weights_file))
    else:
        config = read_config(config_file)
    log = path / METRICS_LOG
    return ModelSource(
        path,
        weights_file,
        config,
        kind,
        _resolution(weights_file, kind, config.image_side),
        _fingerprint(weights_file, config),
        log if kind == "run" and log.is_file() else None,
    )


def _resolution(weights_file: Path, kind: Kind, default: int) -> int:
    """The image side of the training; the config's sample_size is diffusers' tile size."""
    recorded = {}
    if kind in ("run", "checkpoint"):
        recorded = read_json(weights_file.with_name(META))
    elif kind == "folder" and weights_file.with_name(RECORD).is_file():
        recorded = read_json(weights_file.with_name(RECORD)).get("inputs", {})
    return int(recorded.get("resolution", default))


def _fingerprint(file: Path, config: AutoencoderConfig) -> str:
    """Hex digest of a file of weights, or of all shards of an index, and of the config."""
    digests = "".join(sha256(part) for part in weight_parts(file))
    return hashlib.sha256((digests + config.model_dump_json()).encode()).hexdigest()


def hub_id(path: str | Path) -> str | None:
    """`path` as a repository on the Hub; None if it can't be one or its parent folder exists."""
    path = Path(path)
    name = path.as_posix()
    if not _HUB_ID.fullmatch(name) or path.exists() or path.parent.exists():
        return None
    return name


def _downloaded(name: str) -> Path:
    """The folder of a repository on the Hub, with the best weights that it has."""
    folder = Path()
    for patterns in _HUB_FILES:
        folder = snapshot(name, [f"{part}{pattern}" for part in _FOLDERS for pattern in patterns])
        if folder_weights(folder) is not None:
            break
    return folder


def snapshot(name: str, files: Sequence[str]) -> Path:
    """The folder with those of `files` that a repository has, downloaded or from the Hub's cache.

    Raises:
        ModelError: there is no such repository, it is private, or the Hub can't be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(f"{name} is on the Hub; pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (
        Exception
    ) as error:  # the Hub's client raises errors of its own, of its transport and of the system
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ModelError(
            f"{name} is no path here, and the Hub did not give it ({reason}); check the name and the "
            "connection, or log in with `hf auth login`"
        ) from error


def save_weights(state: dict[str, Tensor], file: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write tensors atomically; equal weights give equal bytes in any memory format."""
    plain = {
        key: value.detach()
        .to("cpu", dtype if value.is_floating_point() else None)
        .contiguous(memory_format=torch.contiguous_format)
        for key, value in state.items()
    }
    with atomic_file(file) as temporary:
        save_file(plain, temporary, metadata={"format": "pt"})


def save_model(model: Any, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write diffusers' `config.json` and weights file into `folder`."""
    folder = Path(folder)
    save_weights(model.state_dict(), folder / WEIGHTS, dtype)
    write_json(folder / CONFIG, model.config.diffusers_dict())
