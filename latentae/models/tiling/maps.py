"""Feature maps of a full image, in memory or in a scratch file, used in strips of rows."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

import torch
from latentae_kernels import channel_moments, group_moments
from torch import Tensor, nn

from latentae.errors import OutputError
from latentae.models.latent_statistics import Moments
from latentae.models.tiling.steps import Affine

__all__ = ["Map", "Store", "affine", "moments_of"]


def moments_of(x: Tensor, weight: float = 1.0) -> Moments:
    """Moments of the channels of [1, C, h, w], with each value counted `weight` times."""
    mean, variance = (t[0].cpu().numpy() for t in channel_moments(x))
    count = weight * x.shape[2] * x.shape[3]
    return Moments(count, mean, variance * count)


def affine(norm: nn.GroupNorm, moments: Moments) -> Affine:
    """Scale and shift [C] of a GroupNorm (Wu & He 2018) on a map with these moments [C]."""
    mean, variance = (torch.from_numpy(t)[None] for t in (moments.mean, moments.m2 / moments.count))
    center, total = group_moments(mean, variance, norm.num_groups)
    weight, bias = (t.detach().double().cpu().view(norm.num_groups, -1) for t in (norm.weight, norm.bias))
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    scale = (weight * torch.rsqrt(total.T + norm.eps)).to(dtype)
    shift = bias - center.T * scale.double()  # with the rounded scale: a large mean would multiply its error
    return scale.flatten().to(norm.weight.device), shift.flatten().to(norm.weight.device, dtype)


class Map:
    """A map [height, width, channels] of one image; tensors in and out are [1, C, rows, W].

    Attributes:
        scale: image pixels per pixel of the map.
        moments: of the rows written since the map was created or restarted.
    """

    def __init__(
        self, shape: tuple[int, int, int], scale: int, dtype: torch.dtype, file: IO[bytes] | None
    ) -> None:
        self.height, self.width, self.channels = shape
        self.scale, self.dtype, self.moments = scale, dtype, Moments.empty(self.channels)
        self._file = file
        self._memory = torch.empty(shape, dtype=dtype) if file is None else None
        self._row = self.width * self.channels * dtype.itemsize  # bytes

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop): a view if the map is in memory."""
        if self._memory is not None:
            part = self._memory[start:stop]
        else:
            assert self._file is not None
            part = torch.empty((stop - start, self.width, self.channels), dtype=self.dtype)
            self._file.seek(start * self._row)
            if self._file.readinto(_bytes(part)) != part.nbytes:  # pyright: ignore[reportAttributeAccessIssue]
                raise OutputError("a scratch file lost data; check that nothing else cleans up its folder")
        return part.permute(2, 0, 1).unsqueeze(0)

    def write(self, start: int, strip: Tensor) -> None:
        """Write rows from `start` on and add their moments."""
        self.moments = self.moments.merge(moments_of(strip))
        self.put(start, strip)

    def put(self, start: int, strip: Tensor) -> None:
        """Write rows from `start` on without their moments."""
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
            message = "the disk of the scratch folder is full; pass scratch=FOLDER on a larger one"
            raise OutputError(message) from error

    def add(self, top: int, left: int, part: Tensor) -> None:
        """Add [1, C, h, w] to the values at a position without its moments."""
        rows = self.rows(top, top + part.shape[2])
        rows[..., left : left + part.shape[3]] += part.to(rows)
        if self._memory is None:
            self.put(top, rows)

    def part(self, top: int, left: int, height: int, width: int) -> Tensor:
        """[1, C, height, width] of a box."""
        rows = self.rows(top, top + height)[..., left : left + width]
        return rows.contiguous(memory_format=torch.channels_last)

    def whole(self, like: Tensor) -> Tensor:
        """[1, C, height, width], on the device of `like`; it outlives the map."""
        return self.rows(0, self.height).to(like.device)

    def clear(self, area: int) -> Map:
        """Fill with zeros, in strips of `area` image pixels."""
        for start, stop in self.strips(area):
            self.put(start, torch.zeros(1, self.channels, stop - start, self.width, dtype=self.dtype))
        return self

    def measure(self, area: int) -> Map:
        """Compute the moments of all rows."""
        self.restart()
        for start, stop in self.strips(area):
            self.moments = self.moments.merge(moments_of(self.rows(start, stop)))
        return self

    def strips(self, area: int) -> Iterator[tuple[int, int]]:
        """[start, stop) of strips of about `area` image pixels, at least one row."""
        rows = max(1, area // (self.scale * self.scale * self.width))
        for start in range(0, self.height, rows):
            yield start, min(start + rows, self.height)

    def restart(self) -> Map:
        """Reset the moments, to write the map again."""
        self.moments = Moments.empty(self.channels)
        return self

    def close(self) -> None:
        """Free memory or disk space."""
        if self._file is not None:
            self._file.close()
        self._memory = None


def _bytes(part: Tensor) -> memoryview:
    return memoryview(part.view(torch.uint8).numpy()).cast("B")  # pyright: ignore[reportArgumentType]


class Store:
    """Creates maps in memory, or in nameless files of `folder`, which are gone even after a crash.

    A context manager: it closes all its maps.
    """

    def __init__(self, folder: Path | None, dtype: torch.dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._maps: list[Map] = []

    def new(self, height: int, width: int, channels: int, scale: int) -> Map:
        """An empty map.

        Raises:
            OutputError: the scratch folder is not writable or has too little space.
        """
        file = self._open(height * width * channels * self._dtype.itemsize)
        self._maps.append(Map((height, width, channels), scale, self._dtype, file))
        return self._maps[-1]

    def _open(self, size: int) -> IO[bytes] | None:
        if self._folder is None:
            return None
        try:
            free = shutil.disk_usage(self._folder).free
            if free < size:
                raise OutputError(
                    f"the scratch folder {self._folder} has {free / 2**30:.1f} GiB free, a feature map of "
                    f"this image takes {size / 2**30:.1f}; pass scratch=FOLDER on a larger disk"
                )
            return tempfile.TemporaryFile(dir=self._folder)  # Map.close closes it
        except OSError as error:
            raise OutputError(
                f"can't write to the scratch folder {self._folder}: {error.strerror}; pass another one"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._maps:
            one.close()
