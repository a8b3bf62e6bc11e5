from __future__ import annotations

import pytest
import torch
from latentae_kernels import BackendError, norm_act
from latentae_kernels.reference import norm_act_reference


def tensors(channels: int, shape: tuple[int, ...], dtype: torch.dtype):
    x = torch.randn(shape[0], channels, *shape[1:], dtype=dtype)
    weight, bias, pre_bias = (torch.randn(channels, dtype=dtype) for _ in range(3))
    return x, weight, bias, pre_bias, torch.randn_like(x)


@pytest.mark.parametrize("act", ["silu", "identity"])
@pytest.mark.parametrize("with_pre_bias", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 1), (2, 3, 4, 5), (0, 4, 4)])
def test_equals_the_reference_in_fp64_with_gradients(act, with_pre_bias, with_residual, shape):
    x, weight, bias, pre_bias, residual = (t.requires_grad_() for t in tensors(12, shape, torch.float64))
    inputs = [x, weight, bias] + ([pre_bias] if with_pre_bias else []) + ([residual] if with_residual else [])
    options = {"act": act, "pre_bias": pre_bias if with_pre_bias else None, "residual": residual if with_residual else None}
    results = []
    for function in (norm_act, norm_act_reference):
        out = function(x, weight, bias, 4, **options)
        outs = out if with_residual else (out,)
        grads = torch.autograd.grad([o.square().sum() for o in outs], inputs)
        results.append([*outs, *grads])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_and_single_precision_stay_near_fp64(dtype):
    x, weight, bias, *_ = tensors(32, (2, 9, 9), torch.float64)
    exact = norm_act_reference(x.to(dtype).double(), weight.to(dtype).double(), bias.to(dtype).double(), 8)
    got = norm_act(x.to(dtype), weight.to(dtype), bias.to(dtype), 8)
    assert got.dtype == dtype
    tolerance = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=tolerance)


def test_channels_last_stays_channels_last():
    x, weight, bias, *_ = tensors(8, (2, 4, 6), torch.float32)
    got = norm_act(x.to(memory_format=torch.channels_last), weight, bias, 2)
    torch.testing.assert_close(got, norm_act(x, weight, bias, 2))
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_what_can_not_run_says_so():
    x, weight, bias, *_ = tensors(8, (1, 2, 2), torch.float32)
    with pytest.raises(BackendError, match="no Triton kernel"):
        norm_act(x, weight, bias, 2, backend="triton")
    with pytest.raises(ValueError, match="unknown act 'relu'"):
        norm_act(x, weight, bias, 2, act="relu")  # pyright: ignore
    with pytest.raises(ValueError, match="unknown backend"):
        norm_act(x, weight, bias, 2, backend="cuda")  # pyright: ignore
