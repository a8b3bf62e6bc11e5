"""Checkpoints: a folder that is either whole and verified or not there.

RUN/checkpoints/latest                  the name of the newest whole checkpoint
RUN/checkpoints/step-00001000/
    config.json                         diffusers' own keys
    autoencoder.safetensors  ema.safetensors  discriminator.safetensors
    optimizers.pt                       AdamW states (tensors and numbers only)
    state.json                          step, images seen, position in the data
    recipe.toml                         the resolved recipe
    meta.json                           format, versions, resolution, SHA-256 of every file; written last
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latentae.errors import ModelError, TrainingError
from latentae.files import read_json, sha256, staged_folder, write_json, write_text
from latentae.models.pretrained import CHECKPOINTS, CONFIG, LATEST, META, load_weights, save_weights
from latentae.training.steps import Trainer, TrainState
from latentae.version import __version__

__all__ = ["FORMAT_VERSION", "find_checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT_VERSION = 1


def save_checkpoint(trainer: Trainer, run: Path, data_state: dict[str, Any]) -> Path:
    """Write the state of a run as a new checkpoint, make it the latest and drop the oldest.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
        OutputError: the disk is full or read-only; nothing that looks complete is left.
    """
    _check_finite(trainer, run)
    folder = run / CHECKPOINTS / f"step-{trainer.state.step:08}"
    if not folder.exists():
        with staged_folder(folder) as staging:
            _write_parts(trainer, staging, data_state)
    verify(folder)
    write_text(run / CHECKPOINTS / LATEST, folder.name + "\n")
    _prune(run / CHECKPOINTS, trainer.recipe.keep_checkpoints)
    return folder


def _check_finite(trainer: Trainer, run: Path) -> None:
    bad = [name for name, p in trainer.raw_autoencoder.named_parameters() if not torch.isfinite(p).all()]
    if bad:
        last = run / CHECKPOINTS / LATEST
        known = f"the last good checkpoint is {last.read_text().strip()}" if last.is_file() else "there is no earlier checkpoint"
        raise TrainingError(f"weight {bad[0]} is not finite at step {trainer.state.step}; {known}; lower --optimizer.lr")


def _write_parts(trainer: Trainer, folder: Path, data_state: dict[str, Any]) -> None:
    save_weights(trainer.raw_autoencoder.state_dict(), folder / "autoencoder.safetensors")
    save_weights(trainer.ema.state_dict(), folder / "ema.safetensors")
    optimizers = {"autoencoder": trainer.optimizer.state_dict()}
    if trainer.raw_discriminator is not None and trainer.discriminator_optimizer is not None:
        save_weights(trainer.raw_discriminator.state_dict(), folder / "discriminator.safetensors")
        optimizers["discriminator"] = trainer.discriminator_optimizer.state_dict()
    torch.save(optimizers, folder / "optimizers.pt")
    write_json(folder / CONFIG, trainer.raw_autoencoder.config.diffusers_dict())
    write_json(folder / "state.json", {**asdict(trainer.state), "data": data_state})
    write_text(folder / "recipe.toml", trainer.recipe.toml())
    write_json(
        folder / META,
        {
            "format_version": FORMAT_VERSION,
            "latentae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "resolution": trainer.recipe.data.resolution,
            **asdict(trainer.state),
            "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        },
    )


def verify(folder: Path) -> None:
    """Check that every part of a checkpoint is there with the bytes it was written with.

    Raises:
        TrainingError: a part is missing or differs, or the format is newer than this version.
    """
    try:
        meta = read_json(folder / META)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder} is no whole checkpoint ({META}: {error}); resume from another one") from error
    if meta.get("format_version", 0) > FORMAT_VERSION:
        raise TrainingError(f"{folder} has checkpoint format {meta['format_version']}; this version reads up to {FORMAT_VERSION}")
    for name, digest in meta["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            others = [f.name for f in sorted(folder.parent.glob("step-*")) if f != folder]
            other = f"give --resume {folder.parent / others[-1]} to go back" if others else "there is no other checkpoint"
            raise TrainingError(f"{folder / name} is missing or damaged; {other}")


def _prune(checkpoints: Path, keep: int) -> None:
    for folder in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(folder)


def find_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint of a run folder, `path` itself where it is one, or None."""
    latest = path / CHECKPOINTS / LATEST
    if latest.is_file():
        return path / CHECKPOINTS / latest.read_text(encoding="utf-8").strip()
    return path if (path / META).is_file() else None


def load_checkpoint(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Restore networks, average, optimizers and counters; returns the data position.

    Raises:
        TrainingError: a part is missing or damaged.
        ModelError: the checkpoint is of a model of another shape.
    """
    verify(folder)
    load_weights(trainer.raw_autoencoder, folder / "autoencoder.safetensors")
    try:
        trainer.ema.load_state_dict(load_file(folder / "ema.safetensors"))  # copied to where the average lies
        optimizers = torch.load(folder / "optimizers.pt", map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(optimizers["autoencoder"])
        if trainer.raw_discriminator is not None and trainer.discriminator_optimizer is not None:
            file = folder / "discriminator.safetensors"
            if not file.is_file():
                raise TrainingError(f"{folder} has no discriminator but the recipe asks for one; start a new run")
            trainer.raw_discriminator.load_state_dict(load_file(file))
            trainer.discriminator_optimizer.load_state_dict(optimizers["discriminator"])
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder} does not fit this recipe ({error}); resume with the recipe.toml inside it") from error
    state = read_json(folder / "state.json")
    trainer.state = TrainState(state["step"], state["images_seen"])
    return state["data"]
