"""Going back to a checkpoint's weights without going back in the data, and beginning a phase on another's weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from latentae.errors import TrainingError
from latentae.progress import note
from latentae.training.checkpoint import find_checkpoint, load_checkpoint, read_state, verify
from latentae.training.steps import Trainer

__all__ = ["enter_phase", "restore", "roll_back"]


def restore(trainer: Trainer, folder: Path, phase: int) -> dict[str, Any] | None:
    """Put a checkpoint's state into the trainer of a phase: all of it, or the weights where the checkpoint ended an earlier phase.

    Returns:
        The position in the data; None where the phase begins.
    """
    if read_state(folder).phase == phase:
        return load_checkpoint(trainer, folder)
    enter_phase(trainer, folder, phase)
    return None


def enter_phase(trainer: Trainer, folder: Path, phase: int) -> None:
    """Begin a phase with the weights and averages of a checkpoint of an earlier one; optimizers begin anew.

    A discriminator or another helper of the losses that has changed its shape begins anew too.

    Raises:
        TrainingError: a part is missing or damaged.
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
            raise TrainingError(
                f"{file} is of a model of another shape than phase {phase + 1} of this recipe"
            )
        else:
            note(f"{file} is left out: the {name} of phase {phase + 1} has another shape and begins anew")
    before = read_state(folder)
    trainer.state = replace(before, phase=phase, phase_images=0, skipped_in_a_row=0)


def roll_back(trainer: Trainer, run: Path) -> str:
    """Return weights, averages and optimizers to the last checkpoint; step and images stay, so the data since then is not seen again.

    Returns:
        A line that says what happened.

    Raises:
        TrainingError: there is no checkpoint, or it was done too often.
    """
    state, limits = trainer.state, trainer.recipe.failure
    why = f"{state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite (step {state.step})"
    advice = "lower --optimizer.lr, check the data, or use --precision fp32"
    if state.rollbacks >= limits.max_rollbacks:
        raise TrainingError(f"{why}, after {state.rollbacks} returns to a checkpoint; {advice}")
    folder = find_checkpoint(run)
    if folder is None:
        raise TrainingError(f"{why}, and there is no checkpoint yet to return to; {advice}")
    kept = read_state(folder)
    restore(trainer, folder, state.phase)
    trainer.state = replace(state, skipped_in_a_row=0, rollbacks=state.rollbacks + 1)
    return (
        f"{why}: weights are those of {folder.name} again, and images {kept.images_seen} to {state.images_seen} are not seen again "
        f"(return {state.rollbacks + 1} of {limits.max_rollbacks})"
    )
