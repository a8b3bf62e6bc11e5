"""Triton kernels of `norm_act`.

Element (n, p, c) is at n*C*HW + p*C + c (NHWC) or n*C*HW + c*HW + p (NCHW); every kernel handles
both. A program processes `CHUNK` pixels of `BLOCK_C` channels of one sample and writes partial
results to its own slots, which a small kernel merges in a fixed order: without atomics, two runs
are bit-equal. Where a group fits into registers, one program does all of it.

All statistics are centered. A chunk shifts by the mean of its first tile; chunks are merged as in
Chan, Golub & LeVeque 1983.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(n, first, rows, cols, HW, C: tl.constexpr, NHWC: tl.constexpr):
    """64-bit start of a tile of one sample (x can exceed 2^31 elements), and offsets inside it."""
    if NHWC:
        base = (n * HW + first) * C
        offs = rows[:, None] * C + cols[None, :]
    else:
        base = n * HW * C + first
        offs = cols[None, :].to(tl.int64) * HW + rows[:, None]
    return base, offs


@triton.jit
def _program(HW, chunks, CHUNK, BLOCK_C: tl.constexpr, BACKWARDS):
    """Sample, chunk, first and last pixel and channels of this program."""
    index = tl.program_id(0)
    if BACKWARDS:  # the pass before left its last tiles in the L2 cache
        index = tl.num_programs(0) - 1 - index
    n = (index // chunks).to(tl.int64)
    chunk = index % chunks
    first = (chunk * CHUNK).to(tl.int64)
    last = tl.minimum(first + CHUNK, HW)
    return n, chunk, first, last, tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def _channel(pointer, cols, inside, ACC: tl.constexpr):
    return tl.load(pointer + cols, mask=inside, other=0.0).to(ACC)


@triton.jit
def _total(
    x_ptr, residual_ptr, total_ptr, pre_bias, base, offs, mask, RESIDUAL: tl.constexpr, ACC: tl.constexpr
):
    """The tile to normalize; with a residual the rounded sum, as the backward pass will see it."""
    value = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    if RESIDUAL:
        value += pre_bias[None, :] + tl.load(residual_ptr + base + offs, mask=mask, other=0.0).to(ACC)
        stored = value.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + base + offs, stored, mask=mask)
        value = stored.to(ACC)
    return value


@triton.jit
def _activate(z, SILU: tl.constexpr):
    if SILU:
        z = z * tl.sigmoid(z)
    return z


@triton.jit
def _activation_gradient(dy, z, SILU: tl.constexpr):
    if SILU:
        s = tl.sigmoid(z)
        dy = dy * s * (1.0 + z * (1.0 - s))
    return dy


@triton.jit
def chunk_statistics(
    x_ptr, residual_ptr, pre_bias_ptr, total_ptr, mean_ptr, m2_ptr, HW, chunks, CHUNK,
    C: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over one chunk: [N, chunks, C] each."""
    n, chunk, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=False)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    pre_bias = tl.zeros([BLOCK_C], ACC)
    if PRE_BIAS:
        pre_bias = _channel(pre_bias_ptr, cols, inside, ACC)

    mask = ((first + rows) < last)[:, None] & inside[None, :]
    base, offs = tile_offsets(n, first, rows, cols, HW, C, NHWC)
    value = _total(x_ptr, residual_ptr, total_ptr, pre_bias, base, offs, mask, RESIDUAL, ACC)
    shift = tl.sum(value, 0) / tl.minimum(last - first, BLOCK_HW).to(ACC)
    deviation = tl.where(mask, value - shift[None, :], 0.0)
    total = deviation
    square = deviation * deviation
    for start in range(first + BLOCK_HW, last, BLOCK_HW):
        mask = ((start + rows) < last)[:, None] & inside[None, :]
        base, offs = tile_offsets(n, start, rows, cols, HW, C, NHWC)
        value = _total(x_ptr, residual_ptr, total_ptr, pre_bias, base, offs, mask, RESIDUAL, ACC)
        deviation = tl.where(mask, value - shift[None, :], 0.0)
        total += deviation
        square += deviation * deviation

    drift = tl.sum(total, 0)
    step = drift / (last - first).to(ACC)
    mean = shift + step
    if PRE_BIAS and not RESIDUAL:
        mean += pre_bias
    slot = (n * chunks + chunk) * C + cols
    tl.store(mean_ptr + slot, mean, mask=inside)
    tl.store(m2_ptr + slot, tl.sum(square, 0) - drift * step, mask=inside)


@triton.jit
def merge_statistics(
    chunk_mean_ptr, chunk_m2_ptr, mean_ptr, rstd_ptr, HW, chunks, CHUNK,
    C: tl.constexpr, G: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and 1/sqrt(variance + eps) of one (sample, group) from its chunks."""
    n = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    width: tl.constexpr = C // G
    cols = tl.arange(0, BLOCK_C)
    base = n * chunks * C + group * width
    count = (tl.zeros([], ACC) + HW) * width
    origin = tl.load(chunk_mean_ptr + base)  # averaging differences from it keeps digits where mean >> std
    total = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & (cols < width)[None, :]
        size = tl.minimum(HW - k * CHUNK, CHUNK).to(ACC)[:, None]
        mean = tl.load(chunk_mean_ptr + base + k[:, None] * C + cols[None, :], mask=mask, other=0.0)
        total += tl.where(mask, (mean - origin) * size, 0.0)
    group_mean = origin + tl.sum(tl.sum(total, 1), 0) / count
    square = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & (cols < width)[None, :]
        size = tl.minimum(HW - k * CHUNK, CHUNK).to(ACC)[:, None]
        mean = tl.load(chunk_mean_ptr + base + k[:, None] * C + cols[None, :], mask=mask, other=0.0)
        m2 = tl.load(chunk_m2_ptr + base + k[:, None] * C + cols[None, :], mask=mask, other=0.0)
        square += tl.where(mask, m2 + (mean - group_mean) * (mean - group_mean) * size, 0.0)
    variance = tl.sum(tl.sum(square, 1), 0) / count
    tl.store(mean_ptr + n * G + group, group_mean)
    tl.store(rstd_ptr + n * G + group, 1.0 / tl.sqrt(variance + EPS))


@triton.jit
def _affine(
    pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside,
    C: tl.constexpr, G: tl.constexpr, PRE_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per channel: what to subtract from the stored x, rstd, gamma, beta."""
    at = n * G + cols // (C // G)
    center = tl.load(mean_ptr + at, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=inside, other=0.0)
    if PRE_BIAS:
        center -= _channel(pre_bias_ptr, cols, inside, ACC)
    return center, rstd, _channel(weight_ptr, cols, inside, ACC), _channel(bias_ptr, cols, inside, ACC)


@triton.jit
def apply(
    x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr, HW, chunks, CHUNK,
    C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(gamma * (x + pre_bias - mean) * rstd + beta)."""
    n, _, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=True)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    center, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    scale = rstd * gamma
    for start in range(first, last, BLOCK_HW):
        mask = ((start + rows) < last)[:, None] & inside[None, :]
        base, offs = tile_offsets(n, start, rows, cols, HW, C, NHWC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        z = (x - center[None, :]) * scale[None, :] + beta[None, :]
        tl.store(y_ptr + base + offs, _activate(z, SILU).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_gradients(
    dy_ptr, x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, s1_ptr, s2_ptr, HW, chunks,
    CHUNK,
    C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, SILU: tl.constexpr,
    ACC: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S1 = sum dz and S2 = sum dz * xh of each channel over one chunk: [N, chunks, C] each."""
    n, chunk, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=False)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    center, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    s1 = tl.zeros([BLOCK_HW, BLOCK_C], ACC)
    s2 = tl.zeros([BLOCK_HW, BLOCK_C], ACC)
    for start in range(first, last, BLOCK_HW):
        mask = ((start + rows) < last)[:, None] & inside[None, :]
        base, offs = tile_offsets(n, start, rows, cols, HW, C, NHWC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        xh = (x - center[None, :]) * rstd[None, :]
        # zero where masked, since dy is
        dz = _activation_gradient(dy, xh * gamma[None, :] + beta[None, :], SILU)
        s1 += dz
        s2 += dz * xh
    slot = (n * chunks + chunk) * C + cols
    tl.store(s1_ptr + slot, tl.sum(s1, 0), mask=inside)
    tl.store(s2_ptr + slot, tl.sum(s2, 0), mask=inside)


@triton.jit
def merge_gradients(
    chunk_s1_ptr, chunk_s2_ptr, weight_ptr, sums_ptr, a_ptr, b_ptr, HW, chunks,
    C: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S2 and S1 of one (sample, group) from its chunks, into sums [N, 3, C], and A, B [N, G]."""
    n = (tl.program_id(0) // G).to(tl.int64)
    group = tl.program_id(0) % G
    width: tl.constexpr = C // G
    cols = tl.arange(0, BLOCK_C)
    inside = cols < width
    base = n * chunks * C + group * width
    s1 = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    s2 = tl.zeros([BLOCK_K, BLOCK_C], ACC)
    for start in range(0, chunks, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask = (k < chunks)[:, None] & inside[None, :]
        s1 += tl.load(chunk_s1_ptr + base + k[:, None] * C + cols[None, :], mask=mask, other=0.0)
        s2 += tl.load(chunk_s2_ptr + base + k[:, None] * C + cols[None, :], mask=mask, other=0.0)
    channel_s1 = tl.sum(s1, 0)
    channel_s2 = tl.sum(s2, 0)
    gamma = tl.load(weight_ptr + group * width + cols, mask=inside, other=0.0).to(ACC)
    count = (tl.zeros([], ACC) + HW) * width
    slot = n * 3 * C + group * width + cols
    tl.store(sums_ptr + slot, channel_s2, mask=inside)
    tl.store(sums_ptr + slot + C, channel_s1, mask=inside)
    tl.store(a_ptr + n * G + group, tl.sum(gamma * channel_s1, 0) / count)
    tl.store(b_ptr + n * G + group, tl.sum(gamma * channel_s2, 0) / count)


@triton.jit
def input_gradient(
    dy_ptr, dtotal_ptr, x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr,
    dx_ptr, sums_ptr, HW, chunks, CHUNK,
    C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, DTOTAL: tl.constexpr,
    SUM: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gamma * dz - A - xh * B) (+ dtotal), and its sum per chunk and channel."""
    n, chunk, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=True)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    center, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    at = n * G + cols // (C // G)
    a = tl.load(a_ptr + at, mask=inside, other=0.0)
    b = tl.load(b_ptr + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_HW, BLOCK_C], ACC)
    for start in range(first, last, BLOCK_HW):
        mask = ((start + rows) < last)[:, None] & inside[None, :]
        base, offs = tile_offsets(n, start, rows, cols, HW, C, NHWC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        xh = (x - center[None, :]) * rstd[None, :]
        dz = _activation_gradient(dy, xh * gamma[None, :] + beta[None, :], SILU)
        dx = rstd[None, :] * (gamma[None, :] * dz - a[None, :] - xh * b[None, :])
        if DTOTAL:
            dx += tl.load(dtotal_ptr + base + offs, mask=mask, other=0.0).to(ACC)
        if SUM:
            total += tl.where(mask, dx, 0.0)
        tl.store(dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if SUM:
        tl.store(sums_ptr + (n * chunks + chunk) * C + cols, tl.sum(total, 0), mask=inside)


@triton.jit
def _over_group(per_channel, cols, width: tl.constexpr):
    """The sum over a channel's group for each channel; a tile has complete groups."""
    same = (cols[:, None] // width) == (cols[None, :] // width)
    return tl.sum(tl.where(same, per_channel[None, :], 0.0), 1)


@triton.jit
def resident_forward(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr, HW,
    C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr, SILU: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The forward pass of `GROUPS` groups of one sample in registers: one read, one write."""
    width: tl.constexpr = C // G
    n = (tl.program_id(0) // (G // GROUPS)).to(tl.int64)
    group = (tl.program_id(0) % (G // GROUPS)) * GROUPS
    local = tl.arange(0, BLOCK_C)
    cols = group * width + local
    inside = local < GROUPS * width
    rows = tl.arange(0, BLOCK_HW)
    mask = (rows < HW)[:, None] & inside[None, :]
    pre_bias = tl.zeros([BLOCK_C], ACC)
    if PRE_BIAS:
        pre_bias = _channel(pre_bias_ptr, cols, inside, ACC)
    base, offs = tile_offsets(n, tl.zeros([], tl.int64), rows, cols, HW, C, NHWC)
    value = _total(x_ptr, residual_ptr, total_ptr, pre_bias, base, offs, mask, RESIDUAL, ACC)
    if PRE_BIAS and not RESIDUAL:
        value += pre_bias[None, :]
    value = tl.where(mask, value, 0.0)
    count = (tl.zeros([], ACC) + HW) * width
    mean = _over_group(tl.sum(value, 0), local, width) / count
    deviation = tl.where(mask, value - mean[None, :], 0.0)
    # the sum's rounding, visible where mean >> std
    slip = _over_group(tl.sum(deviation, 0), local, width) / count
    mean += slip
    deviation = tl.where(mask, deviation - slip[None, :], 0.0)
    rstd = 1.0 / tl.sqrt(_over_group(tl.sum(deviation * deviation, 0), local, width) / count + EPS)
    scale = rstd * _channel(weight_ptr, cols, inside, ACC)
    z = deviation * scale[None, :] + _channel(bias_ptr, cols, inside, ACC)[None, :]
    tl.store(y_ptr + base + offs, _activate(z, SILU).to(y_ptr.dtype.element_ty), mask=mask)
    leader = inside & (local % width == 0)
    at = n * G + group + local // width
    tl.store(mean_ptr + at, mean, mask=leader)
    tl.store(rstd_ptr + at, rstd, mask=leader)


@triton.jit
def resident_backward(
    dy_ptr, dtotal_ptr, x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr,
    HW,
    C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr,
    DTOTAL: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_HW: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The backward pass of `GROUPS` groups; sums [N, 3, C] gets S2, S1 and the sum of dx."""
    width: tl.constexpr = C // G
    n = (tl.program_id(0) // (G // GROUPS)).to(tl.int64)
    group = (tl.program_id(0) % (G // GROUPS)) * GROUPS
    local = tl.arange(0, BLOCK_C)
    cols = group * width + local
    inside = local < GROUPS * width
    rows = tl.arange(0, BLOCK_HW)
    mask = (rows < HW)[:, None] & inside[None, :]
    center, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    base, offs = tile_offsets(n, tl.zeros([], tl.int64), rows, cols, HW, C, NHWC)
    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    xh = (x - center[None, :]) * rstd[None, :]
    dz = _activation_gradient(dy, xh * gamma[None, :] + beta[None, :], SILU)
    s1 = tl.sum(dz, 0)
    s2 = tl.sum(dz * xh, 0)
    count = (tl.zeros([], ACC) + HW) * width
    a = _over_group(gamma * s1, local, width) / count
    b = _over_group(gamma * s2, local, width) / count
    dx = rstd[None, :] * (gamma[None, :] * dz - a[None, :] - xh * b[None, :])
    if DTOTAL:
        dx += tl.load(dtotal_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    tl.store(dx_ptr + base + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    slot = n * 3 * C + cols
    tl.store(sums_ptr + slot, s2, mask=inside)
    tl.store(sums_ptr + slot + C, s1, mask=inside)
    tl.store(sums_ptr + slot + 2 * C, tl.sum(tl.where(mask, dx, 0.0), 0), mask=inside)
