"""Checkpoints: saving, verifying and restoring the state of a run, and rollbacks.

A checkpoint is complete or absent.

RUN/checkpoints/latest      the name of the newest complete checkpoint
RUN/checkpoints/step-00001000/
    config.json             diffusers' own keys
    *.safetensors           autoencoder, ema, ...: one file per part of the trainer that has a state
    optimizers.pt           optimizer states (tensors and numbers only)
    state.json              step, images seen, phase, position in the data
    recipe.toml             the resolved recipe
    meta.json               format, versions, resolution, job, SHA-256 of every file; written last

Random numbers are keyed by seed and purpose, so no generator's state is saved. Format 1 (before
phases) had fewer counters and can still be read.
"""

from __future__ import annotations

import io
import platform
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from latentae.errors import ModelError, TrainingError, some
from latentae.file_names import RECIPE
from latentae.files import INCOMPLETE, read_json, sha256, staged_folder, write_json, write_text
from latentae.models.base import Autoencoder
from latentae.models.pretrained import CHECKPOINTS, CONFIG, LATEST, META, load_weights, save_weights
from latentae.progress import note
from latentae.training.steps import Trainer, TrainState
from latentae.version import __version__

__all__ = [
    "FORMAT_VERSION",
    "OPTIMIZERS",
    "STATE",
    "check_meta",
    "discard",
    "enter_phase",
    "find_checkpoint",
    "load_checkpoint",
    "newest",
    "read_state",
    "restore",
    "roll_back",
    "save_checkpoint",
    "verify",
]

FORMAT_VERSION = 2
STATE, OPTIMIZERS = "state.json", "optimizers.pt"


def save_checkpoint(
    trainer: Trainer, run: Path, data_state: dict[str, Any], inputs: Mapping[str, Any] | None = None
) -> Path:
    """Save the state of a run as a new checkpoint, name it the latest and remove the oldest.

    Args:
        trainer: the state.
        run: the run folder.
        data_state: position in the data, as plain JSON values.
        inputs: identity of the job (plain JSON values), kept in meta.json.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
        OutputError: the disk is full or read-only; no incomplete checkpoint is left.
    """
    _check_finite(trainer, run)
    checkpoints = run / CHECKPOINTS
    folder = checkpoints / f"step-{trainer.state.step:08}"
    if find_checkpoint(run) != folder:
        if folder.exists():  # of a run that was killed before it named it the latest
            discard(folder)
        with staged_folder(folder) as staging:
            _write_parts(trainer, staging, data_state, dict(inputs or {}))
    verify(folder)
    write_text(checkpoints / LATEST, folder.name + "\n")
    _prune(folder, trainer.recipe.keep_checkpoints)
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
                f"{part}: {bad[0]} is not finite at step {trainer.state.step}; {known}; "
                "lower --optimizer.lr or use --precision fp32"
            )


def _write_parts(trainer: Trainer, folder: Path, data_state: dict[str, Any], inputs: dict[str, Any]) -> None:
    for name, part in trainer.saved.items():
        state = part.state_dict()
        if state:
            save_weights(state, folder / f"{name}.safetensors")
    optimizers = io.BytesIO()  # torch.save to a file on a full disk fails with "unexpected pos 576 vs 534"
    torch.save({name: optimizer.state_dict() for name, optimizer in trainer.optimizers.items()}, optimizers)
    (folder / OPTIMIZERS).write_bytes(optimizers.getbuffer())
    write_json(folder / CONFIG, trainer.raw_autoencoder.config.diffusers_dict())
    write_json(folder / STATE, {**asdict(trainer.state), "data": data_state})
    write_text(folder / RECIPE, trainer.recipe.toml())
    meta = {
        "format_version": FORMAT_VERSION,
        "latentae": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "resolution": trainer.recipe.data.resolution,
        **asdict(trainer.state),
        "inputs": inputs,
        "sha256": {file.name: sha256(file) for file in sorted(folder.iterdir())},
    }
    write_json(folder / META, meta)


def check_meta(meta: Any, where: str) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint, from its meta.json.

    Raises:
        TrainingError: it lists no files, or the format is newer than this version.
    """
    digests = meta.get("sha256") if isinstance(meta, dict) else None
    if not isinstance(digests, dict) or not digests or any(Path(name).name != name for name in digests):
        raise TrainingError(f"{where} is incomplete ({META} lists no files); resume from another checkpoint")
    if meta.get("format_version", 0) > FORMAT_VERSION:
        found = f"{where} has checkpoint format {meta['format_version']}"
        raise TrainingError(f"{found}; this version reads formats up to {FORMAT_VERSION}")
    return digests


def verify(folder: Path) -> None:
    """Check every file of a checkpoint against its SHA-256.

    Raises:
        TrainingError: a file is missing or differs, or the format is too new; the message names an
            older checkpoint that is complete.
    """
    bad = _damage(folder)
    if bad:
        older = [f for f in sorted(folder.parent.glob("step-*"), reverse=True) if f.name < folder.name]
        other = next((f for f in older if not _damage(f)), None)
        advice = f"continue from --resume {other} with another --output" if other else "there is no older one"
        raise TrainingError(f"{folder / bad} is missing or damaged; {advice}")


def _damage(folder: Path) -> str | None:
    """The first file of a checkpoint that is missing or differs."""
    try:
        meta = read_json(folder / META)
    except (OSError, ValueError):
        return META
    for name, digest in check_meta(meta, str(folder)).items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            return name
    return None


def discard(folder: Path) -> None:
    """Rename a checkpoint to a hidden name, then remove it.

    The next save removes what could not be removed now.
    """
    trash = folder.with_name(f".{folder.name}{INCOMPLETE}")
    shutil.rmtree(trash, ignore_errors=True)
    with suppress(OSError):
        folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def newest(names: list[str], latest: str, keep: int) -> set[str]:
    """Names of checkpoints to keep: the latest, and the newest before it, `keep` in all."""
    older = sorted(name for name in names if name < latest)
    return {latest, *older[max(len(older) - (keep - 1), 0) :]}


def _prune(latest: Path, keep: int) -> None:
    """Remove old checkpoints, later ones of an earlier attempt, and leftovers of killed runs."""
    names = [folder.name for folder in latest.parent.glob("step-*")]
    for name in {*names} - newest(names, latest.name, keep):
        discard(latest.with_name(name))
    for leftover in latest.parent.glob(f".*{INCOMPLETE}"):
        shutil.rmtree(leftover, ignore_errors=True)


def find_checkpoint(path: Path) -> Path | None:
    """The newest checkpoint of a run folder, `path` itself if it is a checkpoint, or None."""
    latest = path / CHECKPOINTS / LATEST
    if latest.is_file():
        return path / CHECKPOINTS / latest.read_text(encoding="utf-8").strip()
    return path if (path / META).is_file() else None


def read_state(folder: Path) -> TrainState:
    """The counters of a checkpoint; counters that its format lacks are 0.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        found = read_json(folder / STATE)
        known = {field.name: found.get(field.name, 0) for field in fields(TrainState)}
        if "phase_images" not in found:  # format 1 had one phase
            known["phase_images"] = found["images_seen"]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        message = f"{folder / STATE} is missing or damaged ({error}); resume from another checkpoint"
        raise TrainingError(message) from error
    return TrainState(**known)


def restore(trainer: Trainer, folder: Path, phase: int) -> dict[str, Any] | None:
    """Load a checkpoint: everything, or only the weights if it ended an earlier phase.

    Returns:
        The position in the data; None at the start of the phase.
    """
    if read_state(folder).phase == phase:
        return load_checkpoint(trainer, folder)
    enter_phase(trainer, folder, phase)
    return None


def load_checkpoint(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Restore networks, moving average, optimizers and counters; returns the position in the data.

    Raises:
        TrainingError: a file is missing or damaged.
        ModelError: the checkpoint's model has another shape.
    """
    verify(folder)
    try:
        for name, part in trainer.saved.items():
            _load_part(part, folder, name)
        left = sorted(file.stem for file in folder.glob("*.safetensors") if file.stem not in trainer.saved)
        if left:
            note(f"{folder}: ignoring {some(left)}, which this recipe does not have")
        optimizers = torch.load(folder / OPTIMIZERS, map_location="cpu", weights_only=True)
        for name, optimizer in trainer.optimizers.items():
            if name not in optimizers:
                raise _missing(folder, f"optimizer of the {name} in {OPTIMIZERS}")
            optimizer.load_state_dict(optimizers[name])
    except (SafetensorError, KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        advice = f"resume with the {RECIPE} inside it"
        raise ModelError(f"{folder} does not fit this recipe ({reason}); {advice}") from error
    trainer.state = read_state(folder)
    return read_json(folder / STATE)["data"]


def _load_part(part: Any, folder: Path, name: str) -> None:
    file = folder / f"{name}.safetensors"
    if not file.is_file():
        if part.state_dict():
            raise _missing(folder, file.name)
    elif isinstance(part, Autoencoder):
        load_weights(part, file)  # names the first key or shape that does not fit
    else:
        part.load_state_dict(load_file(file))


def _missing(folder: Path, what: str) -> TrainingError:
    return TrainingError(
        f"{folder} has no {what}, but this recipe has one; resume with the {RECIPE} inside it, "
        f"or start a new run with --model.init-from {folder}"
    )


def enter_phase(trainer: Trainer, folder: Path, phase: int) -> None:
    """Start a phase with an earlier phase's weights and averages, and new optimizers.

    A discriminator or part of a loss whose shape changed starts anew.

    Raises:
        TrainingError: a file is missing or damaged.
    """
    verify(folder)
    for name, part in trainer.saved.items():
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            continue
        state = load_file(file)
        shapes = {key: value.shape for key, value in part.state_dict().items()}
        if {key: value.shape for key, value in state.items()} == shapes:
            part.load_state_dict(state)
        elif name in ("autoencoder", "ema"):
            raise TrainingError(f"{file} has another model shape than phase {phase + 1} of this recipe")
        else:
            note(f"{file} is ignored: the {name} of phase {phase + 1} has another shape and starts anew")
    trainer.state = replace(read_state(folder), phase=phase, phase_images=0, skipped_in_a_row=0)


def roll_back(trainer: Trainer, run: Path) -> str:
    """Restore weights, averages and optimizers from the last checkpoint.

    Step and images stay, so the data since then is skipped.

    Returns:
        A line for the log.

    Raises:
        TrainingError: there is no checkpoint, or the run was rolled back too often.
    """
    state, limits = trainer.state, trainer.recipe.failure
    why = f"{state.skipped_in_a_row} steps in a row had a non-finite loss or gradient (step {state.step})"
    advice = "lower --optimizer.lr, check the data, or use --precision fp32"
    if state.rollbacks >= limits.max_rollbacks:
        raise TrainingError(f"{why}, after {state.rollbacks} rollbacks; {advice}")
    folder = find_checkpoint(run)
    if folder is None:
        raise TrainingError(f"{why}, and there is no checkpoint yet to roll back to; {advice}")
    kept = read_state(folder)
    restore(trainer, folder, state.phase)
    trainer.state = replace(state, skipped_in_a_row=0, rollbacks=state.rollbacks + 1)
    return (
        f"{why}: restored the weights of {folder.name}; images {kept.images_seen} to "
        f"{state.images_seen} are skipped (rollback {state.rollbacks + 1} of {limits.max_rollbacks})"
    )
