"""Steps on the maps of a full image, strip by strip: the exact result in bounded memory.

A map is in memory or in a scratch file. Normalization k reads the complete output of normalization
k - 1, so steps run one after the other. Each writes its map with the moments of its channels, and
the next reads it. For the convolution, a strip reads one row more above and below than it writes.
"""

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
from latentae.models.blocks import Attention
from latentae.models.latent_statistics import Moments
from latentae.models.tiling.steps import Affine, Convolution, Residual, Step, activate, convolve, scale_change

__all__ = ["Map", "Store", "affine", "moments_of", "stream"]

BLOCK = 1024
"""Keys at a time, at least one row, of attention's scores."""


def stream(steps: list[Step], x: Map, maps: Store, area: int, keys: int | None = None) -> Map:
    """Run the steps on a full map.

    Args:
        steps: in order.
        x: the input, which is closed.
        maps: where results are stored.
        area: image pixels in a strip.
        keys: attention uses at most about this many positions, on a regular grid; None uses all.
    """
    for step in steps:
        if isinstance(step, Attention):
            x = _attend(step, x, maps, area, keys)
        elif isinstance(step, Residual):
            x = _residual(step, x, maps, area)
        else:
            out = _output(step, x, maps)
            _pass(step, x, out, area)
            x.close()
            x = out
    return x


def _output(step: Convolution, x: Map, maps: Store) -> Map:
    change = scale_change(step)
    size = int(x.height * change), int(x.width * change)
    return maps.new(*size, step.conv.out_channels, round(x.scale / change))


def _residual(step: Residual, x: Map, maps: Store, area: int) -> Map:
    h = _output(step.first, x, maps)
    _pass(step.first, x, h, area)
    # from here only the skip reads x, each row just before it is written
    out = x.restart() if step.shortcut is None else _output(step.second, h, maps)
    _pass(step.second, h, out, area, skip=(x, step.shortcut))
    h.close()
    if out is not x:
        x.close()
    return out


def _pass(
    step: Convolution, x: Map, out: Map, area: int, skip: tuple[Map, nn.Conv2d | None] | None = None
) -> None:
    known = None if step.norm is None else affine(step.norm, x.moments)
    device = step.conv.weight.device
    for start, stop in out.strips(area):
        first, last, crop = _needed(step, start, stop, x.height)
        part = x.rows(first, last).to(device)
        y = convolve(step, part if known is None else activate(part, known))[:, :, crop : crop + stop - start]
        if skip is not None:
            source, shortcut = skip
            rows = source.rows(start, stop).to(device)
            y += rows if shortcut is None else shortcut(rows)
        out.write(start, y)


def _needed(step: Convolution, start: int, stop: int, height: int) -> tuple[int, int, int]:
    """Input rows [first, last) for output rows [start, stop), and the extra output rows first."""
    if step.conv.kernel_size == (1, 1):
        return start, stop, 0
    if step.kind == "down":  # windows of three rows from every second one; zeros pad the bottom
        return 2 * start, min(2 * stop + 1, height), 0
    low, high = (start // 2, (stop + 1) // 2) if step.kind == "up" else (start, stop)
    first, last = max(low - 1, 0), min(high + 1, height)
    return first, last, start - first * (2 if step.kind == "up" else 1)


def _attend(attention: Attention, x: Map, maps: Store, area: int, keys: int | None) -> Map:
    """Single-head attention in blocks of queries and keys, written over x.

    Milakov & Gimelshein 2018; Dao et al. 2022.
    """
    known = affine(attention.group_norm, x.moments)
    device = attention.to_q.weight.device
    stride = 1 if keys is None else max(1, -int(-((x.height * x.width / keys) ** 0.5) // 1))
    size = -(-x.height // stride), -(-x.width // stride)
    k, v = (maps.new(*size, x.channels, x.scale * stride) for _ in range(2))
    for start, stop in k.strips(area):
        rows = x.rows(start * stride, min((stop - 1) * stride + 1, x.height))
        part = rows[:, :, ::stride, ::stride].to(device)
        tokens = _tokens(activate(part, known, silu=False))
        for layer, target in ((attention.to_k, k), (attention.to_v, v)):
            target.put(start, _image(layer(tokens), part.shape[-1]))
    x.restart()
    for start, stop in x.strips(area):
        part = x.rows(start, stop).to(device)
        q = attention.to_q(_tokens(activate(part, known, silu=False)))
        x.write(start, _image(attention.to_out[0](_mix(q, k, v)), x.width) + part)
    k.close()
    v.close()
    return x


def _mix(q: Tensor, k: Map, v: Map) -> Tensor:
    """softmax(q k^T / sqrt(C)) v for [n, C] queries, rescaled as larger scores appear."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q = q.to(wide) * q.shape[1] ** -0.5
    highest = torch.full((len(q), 1), -torch.inf, dtype=wide, device=q.device)
    weight, total = torch.zeros_like(highest), torch.zeros_like(q)
    rows = max(1, BLOCK // k.width)
    for start in range(0, k.height, rows):
        stop = min(start + rows, k.height)
        scores = q @ _tokens(k.rows(start, stop).to(q)).T
        higher = torch.maximum(highest, scores.amax(1, keepdim=True))
        shrink = torch.exp(highest - higher)
        shares = scores.sub_(higher).exp_()
        weight = weight * shrink + shares.sum(1, keepdim=True)
        total = torch.addmm(total * shrink, shares, _tokens(v.rows(start, stop).to(q)))
        highest = higher
    return (total / weight).to(k.dtype)


def _tokens(x: Tensor) -> Tensor:
    """[1, C, h, w] -> [h w, C]."""
    return x[0].permute(1, 2, 0).flatten(0, 1)


def _image(tokens: Tensor, width: int) -> Tensor:
    """[h w, C] -> [1, C, h, w]."""
    return tokens.unflatten(0, (-1, width)).permute(2, 0, 1).unsqueeze(0)


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
