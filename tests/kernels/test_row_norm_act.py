"""`row_norm_act`: the kernels (on a GPU, or in Triton's interpreter) and the native operators
against fp64.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from kernel_formulas import row_norm_act_reference
from latentae_kernels import row_norm_act
from latentae_kernels.row_norm_act.kernels import row_tile
from torch import Tensor

BACKENDS = ("triton", "torch")


def tensors(
    shape, dtype, device, channels_last=True, parameters=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and a gradient of y, all leaves."""
    x, dy = torch.randn(2, *shape, dtype=torch.float64).to(device, dtype)
    if channels_last:
        x, dy = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy))
    weight, bias = torch.randn(2, shape[1], dtype=torch.float64).to(device, parameters or dtype)
    return x.requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_(), dy


def results(function, x, weight, bias, dy, **options) -> list[Tensor]:
    """y and the gradients of x, weight and bias."""
    y = function(x, weight, bias, **options)
    inputs = [t for t in (x, weight, bias) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def exact(x, weight, bias, dy, **options) -> list[Tensor]:
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    return results(row_norm_act_reference, *wide, dy.double(), **options)


def error(got: Tensor, expected: Tensor) -> float:
    return (got.double() - expected).norm().item()


@pytest.mark.parametrize("channels_last", [True, False])
def test_layer_norm_keeps_its_digits_where_the_mean_is_far_above_the_spread(channels_last, device):
    x, weight, bias, dy = tensors((2, 96, 5, 5), torch.float32, device, channels_last)
    x = (x.detach() + 3000).requires_grad_()
    got = results(row_norm_act, x, weight, bias, dy, norm="layer", backend="triton")
    for ours, truth in zip(got, exact(x, weight, bias, dy, norm="layer"), strict=True):
        assert error(ours, truth) < 1e-6 * truth.norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_order_is_kept_and_a_gradient_in_the_other_order_is_taken(backend, channels_last, device):
    x, weight, bias, dy = tensors((2, 6, 3, 5), torch.float32, device, channels_last)
    y, dx, *_ = results(row_norm_act, x, weight, bias, dy, backend=backend)
    assert y.stride() == x.stride()
    other = dy.contiguous() if channels_last else dy.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(results(row_norm_act, x, weight, bias, other, backend=backend)[1], dx)
    sliced = torch.randn(2, 6, 3, 10, device=device)[..., ::2]  # dense in no order
    torch.testing.assert_close(
        row_norm_act(sliced, weight, bias, backend=backend), row_norm_act_reference(sliced, weight, bias)
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("channels_last", "with_bias"), [(True, True), (False, False)])
def test_the_operators_keep_torchs_contract(channels_last, with_bias, device):
    x, weight, bias, dy = tensors((2, 5, 3, 2), torch.float32, device, channels_last)
    bias = bias if with_bias else None
    ops = torch.ops.latentae_kernels
    torch.library.opcheck(ops.row_norm_act_forward, (x, weight, bias, 1e-6, "layer", "silu"))
    for parameters in (True, False):
        torch.library.opcheck(
            ops.row_norm_act_backward, (dy, x, weight, bias, 1e-6, "rms", "silu", parameters)
        )


@triton.jit
def where(
    index,
    HW,
    base_ptr,
    last_ptr,
    C: tl.constexpr,
    NHWC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    _, base, offsets, mask = row_tile(index, HW, C, NHWC, ROWS, BLOCK_C)
    tl.store(base_ptr, base)
    tl.store(last_ptr, tl.max(tl.max(tl.where(mask, offsets, 0).to(tl.int64), 1), 0))


@pytest.mark.parametrize("channels_last", [True, False])
def test_addresses_go_past_32_bits(channels_last, device):
    """Three images of 2048 x 2049 pixels and 512 channels: more than 2^31 elements each, too many
    to hold here.
    """
    channels, pixels, rows = 512, 2048 * 2049, 8
    tiles = pixels // rows
    base, last = torch.zeros(2, dtype=torch.int64, device=device).unbind(0)
    where[(1,)](
        2 * tiles + tiles - 1, pixels, base, last, C=channels, NHWC=channels_last, ROWS=rows, BLOCK_C=512
    )
    first = pixels - rows
    assert base.item() == 2 * channels * pixels + (first * channels if channels_last else first)
    assert last.item() == (
        (rows - 1) * channels + channels - 1 if channels_last else (channels - 1) * pixels + rows - 1
    )


def test_bad_arguments_are_named():
    x, weight, bias, _ = tensors((1, 4, 2, 2), torch.float32, "cpu")
    cases: list[tuple[dict, str]] = [
        ({"x": torch.ones(1, 4, 2, 2, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"x": torch.ones(4)}, r"x has shape \(4,\)"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(4,\)"),
        ({"bias": torch.ones(4, 1)}, r"bias has shape \(4, 1\)"),
        ({"weight": torch.ones(4, dtype=torch.bfloat16)}, "weight has dtype torch.bfloat16"),
        ({"bias": torch.ones(4, dtype=torch.float64)}, "bias has dtype torch.float64"),
        ({"weight": torch.ones(4, device="meta")}, "weight is on meta"),
        ({"norm": "batch"}, "unknown norm 'batch'"),
        ({"act": "relu"}, "unknown act 'relu'"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"eps": 0.0}, "eps is 0.0"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            row_norm_act(**{"x": x, "weight": weight, "bias": bias, **wrong})
