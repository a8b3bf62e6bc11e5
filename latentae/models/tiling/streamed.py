"""Steps on the maps of a full image, strip by strip: the exact result in bounded memory.

Normalization k reads the complete output of normalization k - 1, so steps run one after the other.
Each writes its map with the moments of its channels, and the next reads it. For the convolution, a
strip reads one row more above and below than it writes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentae.models.blocks import Attention
from latentae.models.tiling.maps import Map, Store, affine
from latentae.models.tiling.steps import Convolution, Residual, Step, activate, convolve, scale_change

__all__ = ["stream"]

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
    step: Convolution, x: Map, out: Map, area: int, skip: tuple[Map, torch.nn.Conv2d | None] | None = None
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
