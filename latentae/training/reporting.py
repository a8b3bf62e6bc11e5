"""What a run leaves to read: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases, pictures of held-out reconstructions."""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import sys
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
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
    """Appends numbers to `metrics.jsonl`, TensorBoard and Weights & Biases, and what happened to `events.jsonl`.

    Only the first process has one.

    Args:
        run: the run folder.
        step: the step a resumed run goes on from; later lines of an earlier try are dropped from both files.
        options: where else to write.
        recipe: what Weights & Biases shows as the configuration.

    Attributes:
        kept: the lines of metrics.jsonl that a resumed run goes on from.

    Raises:
        OutputError: a file can't be written (then or at a later line), or Weights & Biases does not start.
    """

    def __init__(self, run: Path, step: int, options: LogOptions, recipe: Recipe) -> None:
        self.run = run
        self.kept, dropped = _keep(run / METRICS_LOG, step)
        _keep(run / EVENTS_LOG, step)
        self._wandb = _Wandb(run, options.wandb, recipe) if options.wandb else None
        self._board = _TensorBoard(run, dropped) if options.tensorboard else None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None)

    def write(self, step: int, images: int, values: Mapping[str, float]) -> None:
        """One line: step, images seen and every value; numbers JSON can't hold become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        _append(self.run / METRICS_LOG, {"step": step, "images": images, **finite})
        if self._board is not None:
            self._board.write(images, values)
        if self._wandb is not None:
            self._wandb.write(images, values)

    def event(self, step: int, images: int, kind: str, message: str) -> None:
        """One line about something that happened: a start, a warning, a skipped step, a rollback."""
        _append(self.run / EVENTS_LOG, {"step": step, "images": images, "kind": kind, "message": message})

    def picture(self, images: int, picture: Any) -> None:
        """A PIL image of held-out reconstructions, for TensorBoard and Weights & Biases."""
        if self._board is not None:
            self._board.picture(images, picture)
        if self._wandb is not None:
            self._wandb.picture(images, picture)


class _TensorBoard:
    """Events against images seen.

    Args:
        run: the run folder.
        dropped: lines whose events of an earlier try are to be hidden.
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

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One run of Weights & Biases for one run folder, over all resumptions; its axis is images seen.

    Steps of an earlier try come again there, at the same place of the axis: nothing sent can be taken back.
    """

    def __init__(self, run: Path, project: str | None, recipe: Recipe) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        file = run / WANDB_ID
        if not file.is_file():
            write_text(file, uuid.uuid4().hex + "\n")
        config = recipe.model_dump(mode="json", exclude={"log"})
        name, key = run.resolve().name, file.read_text(encoding="utf-8").strip()
        try:
            self._run = wandb.init(
                project=project, id=key, name=name, dir=str(run), resume="allow", config=config
            )
        except (wandb.Error, OSError) as error:
            raise OutputError(
                f"Weights & Biases does not start ({' '.join(str(error).split())}); run `wandb login`, set WANDB_MODE=offline, or "
                "leave --log.wandb out"
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
    """Make sure that Weights & Biases is there where a recipe asks for it; to be called before any work.

    Raises:
        MissingDependencyError: the package wandb is not installed.
    """
    if not options.wandb:
        return
    found = importlib.util.find_spec("wandb")
    if (
        found is None or found.origin is None
    ):  # a folder `wandb` of logs in the working directory can be imported, too
        raise MissingDependencyError(
            f"log.wandb is {options.wandb!r}, but the package wandb is not installed; pip install 'latentae[wandb]', or leave it out"
        )


def devices(accelerator: Accelerator) -> str:
    """What a run runs on, in words: "4 processes, NVIDIA H100 80GB HBM3, bf16"."""
    device, count = accelerator.device, accelerator.num_processes
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    precision = str(accelerator.mixed_precision).replace("no", "fp32")
    return f"{count} process{'es' if count > 1 else ''}, {name}, {precision}"


def _append(path: Path, line: Mapping[str, Any]) -> None:
    """Add a JSON line by one write; a kill can cut it, but never mix two."""
    data = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    try:
        with path.open("ab", buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, "the disk took a part of a line only")
    except OSError as error:
        advice = write_advice(error.errno)
        raise OutputError(
            f"could not write {path}: {error.strerror}; {advice}; the same command resumes the run"
        ) from error


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far in GB (1e9 bytes): of the GPU's allocator, or of this process; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl or events.jsonl; one that was cut short, or is none of ours, is passed over."""
    if not path.is_file():
        return []
    return [
        line
        for line in map(_parsed, path.read_text(encoding="utf-8", errors="replace").splitlines())
        if line is not None
    ]


def _keep(path: Path, step: int) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """Drop a file's lines after a step; returns those kept and those dropped."""
    lines = read_lines(path)
    kept, dropped = (
        tuple(line for line in lines if (line["step"] <= step) is wanted) for wanted in (True, False)
    )
    if path.is_file():
        write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))
    return kept, dropped


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
        return line if isinstance(line["step"] + line["images"], int) else None
    except (ValueError, TypeError, KeyError):  # the last line of a killed run may be cut
        return None
