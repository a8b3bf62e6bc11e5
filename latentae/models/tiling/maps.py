"""Feature maps of a whole image that a step reads and writes in strips of rows, in memory or in a scratch file."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from latentae_kernels import channel_moments, group_moments
from torch import Tensor, nn

from latentae.errors import OutputError
from latentae.models.tiling.steps import Affine

__all__ = ["Map", "Moments", "Store", "affine", "store"]


class Moments:
    """Mean and variance of each channel over rows that come one after the other, in fp64.

    Parts are merged by the formula of Chan, Golub & LeVeque 1979 ("Updating formulae and a pairwise algorithm"), which is safe
    where means are large beside deviations.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0.0
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.squares = torch.zeros(channels, dtype=torch.float64)  # summed squared deviations from the mean

    def add(self, x: Tensor, weight: float = 1.0) -> None:
        """Take in [1, C, h, w], each value as if it came `weight` times."""
        mean, variance = (t[0].cpu() for t in channel_moments(x))
        count = weight * x.shape[2] * x.shape[3]
        total, delta = self.count + count, mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.squares = self.squares + variance * count + delta.square() * (self.count * count / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """[C], of the values seen."""
        return self.squares / self.count


def affine(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> Affine:
    """Scale and shift [C] that make the GroupNorm (Wu & He 2018) of a map whose channels have these means and variances [C]."""
    centre, total = group_moments(mean.double()[None], variance.double()[None], norm.num_groups)
    weight, bias = (t.detach().double().cpu().view(norm.num_groups, -1) for t in (norm.weight, norm.bias))
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = (weight * torch.rsqrt(total.T + norm.eps)).to(dtype)
    shift = bias - centre.T * scale.double()  # of the rounded scale: a large mean would multiply its error
    place = {"device": norm.weight.device, "dtype": dtype}
    return scale.flatten().to(**place), shift.flatten().to(**place)


class Map:
    """[height, width, channels] of one image; tensors that go in and out are [1, C, rows, W].

    Attributes:
        scale: image pixels per pixel of the map.
        moments: of the rows written since the map was made or restarted.
    """

    def __init__(
        self, shape: tuple[int, int, int], scale: int, dtype: torch.dtype, file: IO[bytes] | None
    ) -> None:
        self.height, self.width, self.channels = shape
        self.scale, self.dtype, self.moments = scale, dtype, Moments(self.channels)
        self._file = file
        self._memory = torch.empty(shape, dtype=dtype) if file is None else None
        self._row = self.width * self.channels * dtype.itemsize  # bytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): a view where the map is in memory."""
        if self._memory is not None:
            part = self._memory[start:stop]
        else:
            assert self._file is not None
            part = torch.empty((stop - start, self.width, self.channels), dtype=self.dtype)
            self._file.seek(start * self._row)
            if self._file.readinto(_bytes(part)) != part.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
                raise OutputError(
                    "a scratch file is shorter than what was written to it; is something else cleaning up its folder?"
                )
        return part.permute(2, 0, 1).unsqueeze(0)

    def write(self, start: int, strip: Tensor) -> None:
        """Rows from `start` on, and their moments."""
        self.moments.add(strip)
        self.put(start, strip)

    def put(self, start: int, strip: Tensor) -> None:
        """Rows from `start` on; the moments stay as they are."""
        part = strip[0].permute(1, 2, 0).to("cpu", self.dtype)
        if self._memory is not None:
            self._memory[start : start + part.shape[0]] = part
            return
        assert self._file is not None
        try:
            self._file.seek(start * self._row)
            self._file.write(_bytes(part.contiguous()))
            self._file.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OutputError(
                "the disk of the scratch folder is full; pass scratch=FOLDER on a larger one"
            ) from error

    def add(self, top: int, left: int, part: Tensor) -> None:
        """Add [1, C, h, w] onto what is there; the moments stay as they are."""
        rows = self.rows(top, top + part.shape[2])
        rows[..., left : left + part.shape[3]] += part.to(rows)
        if self._memory is None:
            self.put(top, rows)

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """[1, C, height, width] of a box."""
        return self.rows(top, top + height)[..., left : left + width].contiguous(
            memory_format=torch.channels_last
        )

    def whole(self, like: Tensor) -> Tensor:
        """[1, C, height, width], on the device of `like`; it stays when the map is closed."""
        return self.rows(0, self.height).to(like.device)

    def clear(self, area: int) -> Map:
        """Zeros everywhere, in strips of `area` image pixels."""
        for start, stop in self.strips(area):
            self.put(start, torch.zeros(1, self.channels, stop - start, self.width, dtype=self.dtype))
        return self

    def measure(self, area: int) -> Map:
        """Take the moments of what is there."""
        self.restart()
        for start, stop in self.strips(area):
            self.moments.add(self.rows(start, stop))
        return self

    def strips(self, area: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of strips of about `area` image pixels, at least a row."""
        rows = max(1, area // (self.scale * self.scale * self.width))
        for start in range(0, self.height, rows):
            yield start, min(start + rows, self.height)

    def restart(self) -> Map:
        """The same map, about to be written anew."""
        self.moments = Moments(self.channels)
        return self

    def close(self) -> None:
        """Give memory or disk space back."""
        if self._file is not None:
            self._file.close()
        self._memory = None


def _bytes(part: Tensor) -> memoryview:
    return memoryview(part.view(torch.uint8).numpy()).cast("B")  # pyright: ignore[reportArgumentType]


class Store:
    """Makes maps: in memory, or in nameless files of `folder`, which no end of the process leaves behind."""

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._maps: list[Map] = []

    def new(self, height: int, width: int, channels: int, scale: int) -> Map:
        """An empty map.

        Raises:
            OutputError: the scratch folder can't be written to or has too little space.
        """
        made = Map(
            (height, width, channels),
            scale,
            self._dtype,
            self._open(height * width * channels * self._dtype.itemsize),
        )
        self._maps.append(made)
        return made

    def _open(self, size: int) -> IO[bytes] | None:
        if self._folder is None:
            return None
        try:
            free = shutil.disk_usage(self._folder).free
            if free < size:
                raise OutputError(
                    f"the scratch folder {self._folder} has {free / 2**30:.1f} GiB free, a feature map of this image takes "
                    f"{size / 2**30:.1f}; pass scratch=FOLDER on a larger disk"
                )
            return tempfile.TemporaryFile(dir=self._folder)  # Map.close closes it
        except OSError as error:
            raise OutputError(
                f"can't write to the scratch folder {self._folder}: {error.strerror}; pass another one"
            ) from error

    def close(self) -> None:
        """Give back what all maps hold."""
        for made in self._maps:
            made.close()


@contextmanager
def store(folder: Path | None, dtype: torch.dtype) -> Iterator[Store]:
    """A store whose maps are gone at the end, whatever happens."""
    maps = Store(folder, dtype)
    try:
        yield maps
    finally:
        maps.close()
