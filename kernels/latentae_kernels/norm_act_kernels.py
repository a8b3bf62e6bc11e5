"""Triton kernels of `norm_act`.

Element (n, p, c) of an activation lies at n*C*HW + p*C + c (NHWC) or n*C*HW + c*HW + p (NCHW); every kernel serves both. A program
owns `CHUNK` pixels of `BLOCK_C` channels of one sample and writes partial results to slots of its own, which a small kernel merges
in a fixed order: no atomics, so two runs are equal to the bit. Where a group fits into registers, one program does all of it.

Statistics are centred throughout. A chunk shifts by the mean of its first tile; chunks are merged by Chan, Golub & LeVeque 1983.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(n, first, rows, cols, HW, C: tl.constexpr, NHWC: tl.constexpr):
    """Where a tile of one sample begins (64 bits: activations can exceed 2^31 elements) and the offsets inside it."""
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
    if BACKWARDS:  # what the pass before read last is still in the L2 cache
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
    """The tile that is normalized. With a residual it is the rounded, stored sum, so that the backward pass sees the same numbers."""
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
    C: tl.constexpr, G: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
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
    centre = tl.load(mean_ptr + at, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=inside, other=0.0)
    if PRE_BIAS:
        centre -= _channel(pre_bias_ptr, cols, inside, ACC)
    return centre, rstd, _channel(weight_ptr, cols, inside, ACC), _channel(bias_ptr, cols, inside, ACC)


@triton.jit
def apply(
    x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, y_ptr, HW, chunks, CHUNK,
    C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = act(gamma * (x + pre_bias - mean) * rstd + beta)."""
    n, _, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=True)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    centre, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    scale = rstd * gamma
    for start in range(first, last, BLOCK_HW):
        mask = ((start + rows) < last)[:, None] & inside[None, :]
        base, offs = tile_offsets(n, start, rows, cols, HW, C, NHWC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_first").to(ACC)
        z = (x - centre[None, :]) * scale[None, :] + beta[None, :]
        tl.store(y_ptr + base + offs, _activate(z, SILU).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_gradients(
    dy_ptr, x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, s1_ptr, s2_ptr, HW, chunks, CHUNK,
    C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """S1 = sum dz and S2 = sum dz * xh of each channel over one chunk: [N, chunks, C] each."""
    n, chunk, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=False)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    centre, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    s1 = tl.zeros([BLOCK_HW, BLOCK_C], ACC)
    s2 = tl.zeros([BLOCK_HW, BLOCK_C], ACC)
    for start in range(first, last, BLOCK_HW):
        mask = ((start + rows) < last)[:, None] & inside[None, :]
        base, offs = tile_offsets(n, start, rows, cols, HW, C, NHWC)
        x = tl.load(x_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0, eviction_policy="evict_last").to(ACC)
        xh = (x - centre[None, :]) * rstd[None, :]
        dz = _activation_gradient(
            dy, xh * gamma[None, :] + beta[None, :], SILU
        )  # zero where masked, since dy is
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
    dy_ptr, dtotal_ptr, x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, a_ptr, b_ptr, dx_ptr, sums_ptr,
    HW, chunks, CHUNK,
    C: tl.constexpr, G: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, DTOTAL: tl.constexpr, SUM: tl.constexpr,
    SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gamma * dz - A - xh * B) (+ dtotal), and its sum over each chunk, which is the gradient of a bias added to x."""
    n, chunk, first, last, cols = _program(HW, chunks, CHUNK, BLOCK_C, BACKWARDS=True)
    inside = cols < C
    rows = tl.arange(0, BLOCK_HW)
    centre, rstd, gamma, beta = _affine(
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
        xh = (x - centre[None, :]) * rstd[None, :]
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
    """Each channel's value replaced by the sum over its group; a tile holds whole groups, of any width."""
    same = (cols[:, None] // width) == (cols[None, :] // width)
    return tl.sum(tl.where(same, per_channel[None, :], 0.0), 1)


@triton.jit
def resident_forward(
    x_ptr, residual_ptr, pre_bias_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, mean_ptr, rstd_ptr, HW,
    C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    SILU: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of `GROUPS` groups of one sample, held in registers: one read, one write."""
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
    slip = (
        _over_group(tl.sum(deviation, 0), local, width) / count
    )  # the sum's rounding, visible where mean >> std
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
    dy_ptr, dtotal_ptr, x_ptr, pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, dx_ptr, sums_ptr, HW,
    C: tl.constexpr, G: tl.constexpr, GROUPS: tl.constexpr, NHWC: tl.constexpr, PRE_BIAS: tl.constexpr, DTOTAL: tl.constexpr,
    SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_HW: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of `GROUPS` groups of one sample; sums [N, 3, C] gets S2, S1 and the sum of dx."""
    width: tl.constexpr = C // G
    n = (tl.program_id(0) // (G // GROUPS)).to(tl.int64)
    group = (tl.program_id(0) % (G // GROUPS)) * GROUPS
    local = tl.arange(0, BLOCK_C)
    cols = group * width + local
    inside = local < GROUPS * width
    rows = tl.arange(0, BLOCK_HW)
    mask = (rows < HW)[:, None] & inside[None, :]
    centre, rstd, gamma, beta = _affine(
        pre_bias_ptr, weight_ptr, bias_ptr, mean_ptr, rstd_ptr, n, cols, inside, C, G, PRE_BIAS, ACC
    )
    base, offs = tile_offsets(n, tl.zeros([], tl.int64), rows, cols, HW, C, NHWC)
    x = tl.load(x_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + base + offs, mask=mask, other=0.0).to(ACC)
    xh = (x - centre[None, :]) * rstd[None, :]
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


def plans() -> list:
    """What is compiled ahead of time: every kernel at the widths of the shipped autoencoders, in half and single precision."""
    from .aot import Plan
    from .norm_act_launch import Problem, choose_config

    def plan(
        kernel,
        label: str,
        problem: Problem,
        backward: bool,
        dtype: str,
        ints: tuple[str, ...],
        gates: dict,
        **constants,
    ):
        config = choose_config(problem, 132, backward)
        constants |= {"C": problem.c, "ACC": tl.float32}
        if kernel in (merge_statistics, merge_gradients):
            constants |= {"BLOCK_K": 64, "BLOCK_C": triton.next_power_of_2(problem.c // problem.groups)}
        else:
            constants |= {
                "BLOCK_HW": config.block_hw,
                "BLOCK_C": config.block_c,
                "NHWC": problem.channels_last,
            }
        if config.resident_groups:
            constants["GROUPS"] = config.resident_groups
        single = (
            "weight_ptr",
            "bias_ptr",
            "pre_bias_ptr",
            "mean_ptr",
            "rstd_ptr",
            "a_ptr",
            "b_ptr",
            "sums_ptr",
            "m2_ptr",
        )
        signature = {}
        for name in kernel.arg_names:
            if name in constants:
                signature[name] = "constexpr"
            elif name in ints:
                signature[name] = "i32"
            else:
                signature[name] = "*fp32" if name in single or name.startswith("chunk_") else f"*{dtype}"
        order = "nhwc" if problem.channels_last else "nchw"
        aligned = tuple(n for n in signature if n.endswith("_ptr")) + (
            () if problem.hw % 16 else ("HW", "CHUNK")
        )
        warps = 4 if "BLOCK_K" in constants else config.num_warps
        return Plan(
            f"norm_act/{label} {order} {dtype} C={problem.c} HW={problem.hw}", kernel, signature, constants,
            tuple(n for n in aligned if n in signature), warps, **gates,
        )  # fmt: skip

    size = ("HW", "chunks", "CHUNK")
    found = []
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        for c, hw, channels_last in (
            (128, 65536, True),
            (96, 65536, True),
            (320, 4096, True),
            (512, 4096, True),
            (128, 65536, False),
        ):
            p = Problem(8, c, hw, 32, itemsize, channels_last)
            common = {"G": 32, "PRE_BIAS": True, "SILU": True}
            found += [
                plan(
                    chunk_statistics,
                    "chunk_statistics",
                    p,
                    False,
                    dtype,
                    size,
                    {"registers": 128},
                    PRE_BIAS=True,
                    RESIDUAL=True,
                ),
                plan(apply, "apply", p, False, dtype, size, {"registers": 96}, **common),
                plan(chunk_gradients, "chunk_gradients", p, True, dtype, size, {"registers": 128}, **common),
                plan(
                    input_gradient,
                    "input_gradient",
                    p,
                    True,
                    dtype,
                    size,
                    {"registers": 128},
                    DTOTAL=True,
                    SUM=True,
                    **common,
                ),
            ]
        p = Problem(8, 512, 4096, 32, itemsize, True)
        narrow = {"wide_loads": False}
        found.append(
            plan(merge_statistics, "merge_statistics", p, False, dtype, size, narrow, G=32, EPS=1e-6)
        )
        found.append(plan(merge_gradients, "merge_gradients", p, True, dtype, size[:2], narrow, G=32))
        gates = {"registers": 128}
        common = {"G": 32, "PRE_BIAS": True, "SILU": True}
        p = Problem(8, 512, 1024, 32, itemsize, True)
        found.append(
            plan(
                resident_forward,
                "resident_forward",
                p,
                False,
                dtype,
                ("HW",),
                gates,
                RESIDUAL=True,
                EPS=1e-6,
                **common,
            )
        )
        p = Problem(8, 512, 256, 32, itemsize, True)
        found.append(
            plan(
                resident_backward, "resident_backward", p, True, dtype, ("HW",), gates, DTOTAL=True, **common
            )
        )
    return found
