"""The exception tree: every error that a user can cause or meet.

    LatentAEError
    |-- RecipeError             a recipe key or value
    |-- DataError               input data
    |   |-- ShardError          a shard: missing, empty, damaged
    |   `-- ImageError          an image: unreadable, wrong size, wrong channels
    |-- ModelError              a model folder, its config or its weights
    |-- WeightsError            pretrained weights of a perceptual network that can't be loaded
    |-- OutputError             an output folder that can't be written or holds something else
    |   `-- BusyError           an output folder that another process is working in
    |-- TrainingError           a run that can't continue
    |-- MissingDependencyError  an optional package that this step needs
    `-- Interrupted             Ctrl-C, SIGTERM or SIGUSR1, after the state was saved

Messages are one line: what was found, what was expected, what to do.
"""

from __future__ import annotations

from collections.abc import Collection

__all__ = [
    "BusyError",
    "DataError",
    "ImageError",
    "Interrupted",
    "LatentAEError",
    "MissingDependencyError",
    "ModelError",
    "OutputError",
    "RecipeError",
    "ShardError",
    "TrainingError",
    "WeightsError",
    "first_line",
    "some",
]


class LatentAEError(Exception):
    """Base of all errors; `exit_code` is the exit code of the command line."""

    exit_code = 1


class RecipeError(LatentAEError):
    """A recipe key or value that is unknown or not allowed."""

    exit_code = 2


class DataError(LatentAEError):
    """Input data that is missing or unusable."""


class ShardError(DataError):
    """A shard that is missing, empty or damaged."""


class ImageError(DataError):
    """An image that can't be read or has the wrong shape."""


class ModelError(LatentAEError):
    """A model folder, config or state dict that does not fit."""


class WeightsError(LatentAEError):
    """Pretrained weights of a perceptual network that can't be loaded."""


class OutputError(LatentAEError):
    """An output folder that can't be written, or that holds something else."""


class BusyError(OutputError):
    """An output folder that another process is working in; the same command can run later."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class TrainingError(LatentAEError):
    """A training run that can't continue."""


class MissingDependencyError(LatentAEError):
    """An optional package that this step needs is not installed."""


class Interrupted(LatentAEError):
    """Stopped by a signal after the state was saved, or before there was anything to save.

    Args:
        message: where it stopped.
        exit_code: `SIGINT` for Ctrl-C, `REQUEUE` for a scheduler's signal.
    """

    SIGINT = 130  # 128 + SIGINT, as shells expect
    REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes

    def __init__(self, message: str, exit_code: int = SIGINT) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def some(names: Collection[str], most: int = 4) -> str:
    """The first names for a message, and the number of further names."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, or else the error's type."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
