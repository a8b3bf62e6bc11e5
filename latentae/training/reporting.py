"""What a run leaves to read: metrics.jsonl, TensorBoard events, pictures of held-out reconstructions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any

from latentae.files import write_text
from latentae.models.pretrained import METRICS_LOG

__all__ = ["MetricsLog"]


class MetricsLog:
    """Appends lines to `metrics.jsonl` and the same numbers to TensorBoard; only the first process has one.

    Args:
        run: the run folder.
        step: the step a resumed run goes on from; later lines of an earlier try are dropped.
        tensorboard: whether to write events too.
    """

    def __init__(self, run: Path, step: int, tensorboard: bool) -> None:
        self.path = run / METRICS_LOG
        if self.path.is_file():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            write_text(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step or None)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, step: int, images: int, values: dict[str, float]) -> None:
        """One line: step, images seen and every value; numbers JSON can't hold become null."""
        line: dict[str, Any] = {"step": step, "images": images}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, images)

    def picture(self, images: int, picture: Any) -> None:
        """A PIL image of held-out reconstructions as a TensorBoard event."""
        if self._events is not None:
            import numpy as np

            self._events.add_image("validation/reconstructions", np.asarray(picture), images, dataformats="HWC")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed run may be cut
        return math.inf
