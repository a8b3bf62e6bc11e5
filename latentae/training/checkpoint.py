"""Checkpoints: a folder that is either whole and verified or not there.

RUN/checkpoints/latest                  the name of the newest whole checkpoint
RUN/checkpoints/step-00001000/
    config.json                         diffusers' own keys
    autoencoder.safetensors  ema.safetensors  ...   one file for each part of the trainer that has a state
    optimizers.pt                       AdamW states (tensors and numbers only)
    state.json                          step, images seen, phase, position in the data
    recipe.toml                         the resolved recipe
    meta.json                           format, versions, resolution, the job, SHA-256 of every file; written last

All randomness of a run is keyed by its seed and what it is for, so there is no generator's state to keep. Format 1 (before phases)
had the same parts and fewer counters, and is still read.
"""

from __future__ import annotations

import io
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latentae.errors import ModelError, TrainingError, some
from latentae.file_names import RECIPE
from latentae.files import read_json, sha256, staged_folder, write_json, write_text
from latentae.models.base import Autoencoder
from latentae.models.pretrained import CHECKPOINTS, CONFIG, LATEST, META, load_weights, save_weights
from latentae.progress import note
from latentae.training.steps import Trainer, TrainState
from latentae.version import __version__

if TYPE_CHECKING:
    from latentae.training.mirror import Mirror

__all__ = [
    "FORMAT_VERSION",
    "OPTIMIZERS",
    "STATE",
    "check_meta",
    "discard",
    "find_checkpoint",
    "load_checkpoint",
    "read_state",
    "save_checkpoint",
    "verify",
]

FORMAT_VERSION = 2
STATE, OPTIMIZERS = "state.json", "optimizers.pt"


def save_checkpoint(
    trainer: Trainer,
    run: Path,
    data_state: dict[str, Any],
    inputs: Mapping[str, Any] | None = None,
    mirror: Mirror | None = None,
) -> Path:
    """Write the state of a run as a new checkpoint, make it the latest and drop the oldest.

    Args:
        trainer: what is saved.
        run: the run folder.
        data_state: position in the data, as plain JSON values.
        inputs: what makes this job the same as another (plain JSON values); kept in meta.json.
        mirror: where a copy goes. A copy that fails is said and does not stop the run.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
        OutputError: the disk is full or read-only; nothing that looks complete is left.
    """
    _check_finite(trainer, run)
    checkpoints = run / CHECKPOINTS
    folder = checkpoints / f"step-{trainer.state.step:08}"
    if find_checkpoint(run) != folder:
        if folder.exists():  # a killed run came so far, but not to naming it the latest
            discard(folder)
        with staged_folder(folder) as staging:
            _write_parts(trainer, staging, data_state, dict(inputs or {}))
    verify(folder)
    write_text(checkpoints / LATEST, folder.name + "\n")
    _prune(folder, trainer.recipe.keep_checkpoints)
    if mirror is not None:
        mirror.push(folder)
    return folder


def _check_finite(trainer: Trainer, run: Path) -> None:
    for part, saved in trainer.saved.items():
        state = {name: value for name, value in saved.state_dict().items() if value.is_floating_point()}
        if not state:
            continue
        finite = torch.stack([torch.isfinite(value).all() for value in state.values()]).tolist()
        bad = [name for name, good in zip(state, finite, strict=True) if not good]
        if bad:
            last = find_checkpoint(run)
            known = f"the last good checkpoint is {last.name}" if last else "there is no earlier checkpoint"
            raise TrainingError(
                f"{part}: {bad[0]} is not finite at step {trainer.state.step}; {known}; lower --optimizer.lr or use --precision fp32"
            )


def _write_parts(trainer: Trainer, folder: Path, data_state: dict[str, Any], inputs: dict[str, Any]) -> None:
    for name, part in trainer.saved.items():
        state = part.state_dict()
        if state:
            save_weights(state, folder / f"{name}.safetensors")
    optimizers = io.BytesIO()  # torch.save into a file says "unexpected pos 576 vs 534" of a full disk
    torch.save({name: optimizer.state_dict() for name, optimizer in trainer.optimizers.items()}, optimizers)
    (folder / OPTIMIZERS).write_bytes(optimizers.getbuffer())
    write_json(folder / CONFIG, trainer.raw_autoencoder.config.diffusers_dict())
    write_json(folder / STATE, {**asdict(trainer.state), "data": data_state})
    write_text(folder / RECIPE, trainer.recipe.toml())
    write_json(
        folder / META,
        {
            "format_version": FORMAT_VERSION,
            "latentae": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "resolution": trainer.recipe.data.resolution,
            **asdict(trainer.state),
            "inputs": inputs,
            "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
        },
    )


def check_meta(meta: Any, where: str) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, from its meta.json.

    Raises:
        TrainingError: it is none, or of a newer format.
    """
    digests = meta.get("sha256") if isinstance(meta, dict) else None
    if not isinstance(digests, dict) or not digests or any(Path(name).name != name for name in digests):
        raise TrainingError(
            f"{where} is no whole checkpoint ({META} lists no files); resume from another one"
        )
    if meta.get("format_version", 0) > FORMAT_VERSION:
        raise TrainingError(
            f"{where} has checkpoint format {meta['format_version']}; this version reads up to {FORMAT_VERSION}"
        )
    return digests


def verify(folder: Path) -> None:
    """Check that every part of a checkpoint is there with the bytes it was written with.

    Raises:
        TrainingError: a part is missing or differs, or the format is newer than this version; an older whole checkpoint is named.
    """
    bad = _damage(folder)
    if bad:
        others = [f for f in sorted(folder.parent.glob("step-*"), reverse=True) if f != folder]
        other = next((f for f in others if f.name < folder.name and not _damage(f)), None)
        advice = (
            f"give --resume {other} and another --output to go on from there"
            if other
            else "there is no other checkpoint"
        )
        raise TrainingError(f"{folder / bad} is missing or damaged; {advice}")


def _damage(folder: Path) -> str | None:
    """The first part of a checkpoint that is missing or differs."""
    try:
        meta = read_json(folder / META)
    except (OSError, ValueError):
        return META
    for name, digest in check_meta(meta, str(folder)).items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            return name
    return None


def discard(folder: Path) -> None:
    """Remove a checkpoint: out of sight at once, then from the disk. What can't be removed now is tried again after the next save."""
    trash = folder.with_name(f".{folder.name}.incomplete")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(OSError):
        folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _prune(latest: Path, keep: int) -> None:
    """Keep the latest and the newest before it; drop the rest, also what killed runs have left or came to later than this one."""
    older = [folder for folder in sorted(latest.parent.glob("step-*")) if folder.name < latest.name]
    kept = {latest, *older[max(len(older) - (keep - 1), 0) :]}
    for folder in latest.parent.glob("step-*"):
        if folder not in kept:
            discard(folder)
    for leftover in latest.parent.glob(".*.incomplete"):
        shutil.rmtree(leftover, ignore_errors=True)


def find_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint of a run folder, `path` itself where it is one, or None."""
    latest = path / CHECKPOINTS / LATEST
    if latest.is_file():
        return path / CHECKPOINTS / latest.read_text(encoding="utf-8").strip()
    return path if (path / META).is_file() else None


def read_state(folder: Path) -> TrainState:
    """The counters of a checkpoint; those that its format did not have are 0.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        found = read_json(folder / STATE)
        known = {field.name: found.get(field.name, 0) for field in fields(TrainState)}
        if "phase_images" not in found:  # format 1 knew one phase
            known["phase_images"] = found["images_seen"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise TrainingError(
            f"{folder / STATE} is missing or damaged ({error}); resume from another checkpoint"
        ) from error
    return TrainState(**known)


def load_checkpoint(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Restore networks, average, optimizers and counters; returns the data position.

    Raises:
        TrainingError: a part is missing or damaged.
        ModelError: the checkpoint is of a model of another shape.
    """
    verify(folder)
    try:
        for name, part in trainer.saved.items():
            _load_part(part, folder, name)
        left = sorted(file.stem for file in folder.glob("*.safetensors") if file.stem not in trainer.saved)
        if left:
            note(f"{folder}: left out {some(left)}, which this recipe does not have")
        optimizers = torch.load(folder / OPTIMIZERS, map_location="cpu", weights_only=True)
        for name, optimizer in trainer.optimizers.items():
            if name not in optimizers:
                raise _missing(folder, name, OPTIMIZERS)
            optimizer.load_state_dict(optimizers[name])
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{folder} does not fit this recipe ({reason}); resume with the recipe.toml inside it"
        ) from error
    trainer.state = read_state(folder)
    return read_json(folder / STATE)["data"]


def _load_part(part: Any, folder: Path, name: str) -> None:
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        if part.state_dict():
            raise _missing(folder, name, file.name)
    elif isinstance(part, Autoencoder):
        load_weights(part, file)  # names the first key or shape that does not fit
    else:
        part.load_state_dict(load_file(file))


def _missing(folder: Path, name: str, file: str) -> TrainingError:
    where = f"no {file}" if file != OPTIMIZERS else f"no optimizer of the {name} in {file}"
    return TrainingError(
        f"{folder} has {where}, but this recipe has one; resume with the recipe.toml inside it, or begin a new run with "
        f"--model.init-from {folder}"
    )
