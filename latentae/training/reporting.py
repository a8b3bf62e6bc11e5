"""Logs of a run: metrics.jsonl, events.jsonl, TensorBoard and Weights & Biases.

Devices and memory in words and numbers.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentae.errors import MissingDependencyError, OutputError
from latentae.file_names import EVENTS_LOG, METRICS_LOG
from latentae.files import write_advice, write_text
from latentae.training.options import LogOptions
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["MetricsLog", "check_wandb", "devices", "peak_memory_gb", "read_lines"]

WANDB_ID = "wandb_id.txt"
PICTURE = "validation/reconstructions"


class MetricsLog:
    """Appends metrics to `metrics.jsonl` and other loggers, and events to `events.jsonl`.

    Only the first process has one.

    Args:
        run: the run folder.
        step: step at which a run resumes; later lines of an earlier attempt are removed from both
            files.
        options: additional loggers.
        recipe: the configuration that Weights & Biases shows.

    Attributes:
        kept: the lines of metrics.jsonl before `step`.

    Raises:
        OutputError: a file can't be written (now or later), or Weights & Biases does not start.
    """

    def __init__(self, run: Path, step: int, options: LogOptions, recipe: Recipe) -> None:
        self.run = run
        self.kept, dropped = _keep(run / METRICS_LOG, step)
        _keep(run / EVENTS_LOG, step)
        self._loggers: list[_Wandb | _TensorBoard] = []
        if options.wandb:
            self._loggers.append(_Wandb(run, options.wandb, recipe))
        if options.tensorboard:
            self._loggers.append(_TensorBoard(run, dropped))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for logger in reversed(self._loggers):
            logger.close(failed=kind is not None)

    def write(self, step: int, images: int, values: Mapping[str, float]) -> None:
        """Append one line: step, images seen and all values; NaN and infinity become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        _append(self.run / METRICS_LOG, {"step": step, "images": images, **finite})
        for logger in self._loggers:
            logger.write(images, values)

    def event(self, step: int, images: int, kind: str, message: str) -> None:
        """Append a line about a start, a warning, a skipped step or a rollback."""
        _append(self.run / EVENTS_LOG, {"step": step, "images": images, "kind": kind, "message": message})

    def picture(self, images: int, picture: Any) -> None:
        """Send a PIL image of held-out reconstructions to TensorBoard and Weights & Biases."""
        for logger in self._loggers:
            logger.picture(images, picture)


class _TensorBoard:
    """Events against images seen.

    Args:
        run: the run folder.
        dropped: lines of an earlier attempt, whose events are hidden.
    """

    def __init__(self, run: Path, dropped: Iterable[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first = min((line["images"] for line in dropped), default=None)
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first)

    def write(self, images: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, images)

    def picture(self, images: int, picture: Any) -> None:
        import numpy as np

        self._writer.add_image(PICTURE, np.asarray(picture), images, dataformats="HWC")

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """One Weights & Biases run per run folder, across all resumes, against images seen.

    Data that was sent can't be removed, so the steps of an earlier attempt appear again at the same
    position.
    """

    def __init__(self, run: Path, project: str | None, recipe: Recipe) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        file = run / WANDB_ID
        if not file.is_file():
            write_text(file, uuid.uuid4().hex + "\n")
        settings = {"project": project, "id": file.read_text(encoding="utf-8").strip(), "resume": "allow"}
        settings |= {"name": run.resolve().name, "dir": str(run)}
        try:
            self._run = wandb.init(**settings, config=recipe.model_dump(mode="json", exclude={"log"}))
        except (wandb.Error, OSError) as error:
            raise OutputError(
                f"Weights & Biases does not start ({' '.join(str(error).split())}); run `wandb login`, set "
                "WANDB_MODE=offline, or leave --log.wandb out"
            ) from error
        self._image = wandb.Image
        self._run.define_metric("images")
        self._run.define_metric("*", step_metric="images")

    def write(self, images: int, values: Mapping[str, float]) -> None:
        self._run.log({"images": images, **values})

    def picture(self, images: int, picture: Any) -> None:
        self._run.log({"images": images, PICTURE: self._image(picture)})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def check_wandb(options: LogOptions) -> None:
    """Check, before any work, that wandb is installed if the recipe uses it.

    Raises:
        MissingDependencyError: it is not.
    """
    if not options.wandb:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder `wandb` of logs is importable but has no origin
        raise MissingDependencyError(
            f"log.wandb is {options.wandb!r}, but wandb is not installed; "
            "pip install 'latentae[wandb]', or leave it out"
        )


def devices(accelerator: Accelerator) -> str:
    """Processes, device and precision: "4 processes, NVIDIA H100 80GB HBM3, bf16"."""
    device, count = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = str(accelerator.mixed_precision).replace("no", "fp32")
    return f"{count} process{'es' if count > 1 else ''}, {name}, {precision}"


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes) of the GPU's allocator, or of this process.

    NaN on Windows without a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or events.jsonl, without truncated or foreign lines."""
    if not path.is_file():
        return []
    lines = map(_parsed, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [line for line in lines if line is not None]


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        return line if isinstance(line["step"] + line["images"], int) else None
    except (ValueError, TypeError, KeyError):  # a killed run may truncate its last line
        return None


def _keep(path: Path, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Remove a file's lines after a step; returns those kept and those removed."""
    lines = read_lines(path)
    kept, dropped = ([line for line in lines if (line["step"] <= step) is wanted] for wanted in (True, False))
    if path.is_file():
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return kept, dropped


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Append a JSON line with one write; a kill can truncate it, but never mix two."""
    data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the disk took only a part of a line")
    except OSError as error:
        advice = f"{write_advice(error.errno)}; run the same command again to resume"
        raise OutputError(f"could not write {path}: {error.strerror}; {advice}") from error
