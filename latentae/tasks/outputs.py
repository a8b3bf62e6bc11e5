"""Outputs of tasks: folders that are filled in parts, thumbnails, heat maps, PNGs with a note."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from latentae.errors import ImageError
from latentae.files import atomic_file, read_json, write_json
from latentae.jobs import Job
from latentae.pages.images import image_grid, pil_image
from latentae.progress import Progress, say

__all__ = ["NOTE", "PartedJob", "check_png", "heat_picture", "thumbnails", "write_noted_png"]

SUMMARY = "summary.json"
NOTE = "latentae"  # the text chunk of a PNG
_SHORT_SIDE = 128  # of a thumbnail, in pixels, about


class PartedJob:
    """An output folder that is filled from inputs 0 to `total`, in parts of `size`.

    The rows of finished parts wait under `parts/` until all are there.

    Args:
        folder: output folder.
        verb: the task's name.
        inputs: identity of the job.
        total: number of inputs.
        size: inputs per part.

    Raises:
        OutputError: the folder can't be used or holds something else.
    """

    def __init__(
        self, folder: str | Path, verb: str, inputs: Mapping[str, Any], total: int, size: int
    ) -> None:
        self.folder, self._verb = Path(folder), verb
        self._job = Job.open(folder, verb, inputs)
        self.total, self._size = total, size
        self._parts = self.folder / "parts"

    def earlier_result(self) -> dict[str, Any] | None:
        """The summary of the job if it is finished."""
        if self._job.state != "finished":
            return None
        say(f"{self._verb}: {self.folder} already holds this result; see {self.folder / SUMMARY}")
        return read_json(self.folder / SUMMARY)

    def run(self, make: Callable[[int, range, Progress], Sequence[Mapping[str, Any]]]) -> None:
        """Do all parts that are not finished.

        Args:
            make: takes a part's number and inputs, writes its files and returns its table rows.
        """
        with Progress(self._verb, self.total) as progress:
            for part, file in enumerate(self._files()):
                inputs = range(part * self._size, min((part + 1) * self._size, self.total))
                if file.is_file():
                    progress.advance(len(inputs))
                else:
                    write_json(file, list(make(part, inputs, progress)))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of all parts in order; memory holds one part."""
        for file in self._files():
            yield from read_json(file)

    def write_table(self, file: str, columns: Sequence[str]) -> None:
        """Write all rows as one CSV; None is an empty cell, keys that are not UTF-8 are escaped."""
        options: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
        with atomic_file(self.folder / file) as temporary, temporary.open("w", **options) as target:
            writer = csv.writer(target, lineterminator="\n")
            writer.writerow(columns)
            for row in self.rows():
                writer.writerow(["" if row[name] is None else row[name] for name in columns])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the summary, record that the job is finished and remove the kept rows."""
        write_json(self.folder / SUMMARY, result)
        self._job.finish(images=self.total)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [self._parts / f"{part:05}.json" for part in range(-(-self.total // self._size))]


def check_png(file: str | Path) -> Path:
    """The path of a picture to write.

    Raises:
        ImageError: it does not end in .png.
    """
    if Path(file).suffix.lower() != ".png":
        raise ImageError(f"the picture is written as PNG, got {file}; give a name that ends in .png")
    return Path(file)


def thumbnails(rows: Sequence[Sequence[Tensor]], columns: int = 8) -> Tensor:
    """Rows of uint8 images [1, 3 or 4, H, W] as one picture; small images are enlarged."""
    return image_grid([[_enlarged(image) for image in row] for row in rows], columns=columns)


def _enlarged(image: Tensor) -> Tensor:
    times = max(_SHORT_SIDE // min(image.shape[1:]), 1)
    return image.repeat_interleave(times, 1).repeat_interleave(times, 2)


def heat_picture(heat: Tensor) -> Tensor:
    """[H, W] from 0 (black) to 1 (yellow) as uint8 [3, H, W] in matplotlib's "inferno"."""
    from matplotlib import colormaps

    levels = (heat.float().clamp(0.0, 1.0) * 255).round().byte().cpu().numpy()
    return torch.from_numpy(colormaps["inferno"](levels, bytes=True)[..., :3]).permute(2, 0, 1).contiguous()


def write_noted_png(file: Path, image: Tensor, note: Mapping[str, Any]) -> None:
    """Write uint8 [C, H, W] as a PNG whose text chunk "latentae" holds `note` as JSON."""
    info = PngInfo()
    info.add_text(NOTE, json.dumps(note))
    with atomic_file(file) as temporary:
        pil_image(image).save(temporary, "PNG", optimize=True, pnginfo=info)
