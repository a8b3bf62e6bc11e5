from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from latentae_kernels import Norm, norm_act, norm_act_conv2d, use_backend


def tensors(device, dtype=torch.float64, channels=6, size=(3, 4)):
    x = torch.randn(2, channels, *size, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    vectors = [torch.randn(channels, dtype=dtype, device=device) for _ in range(3)]
    conv_weight = torch.randn(4, channels, 3, 3, dtype=dtype, device=device).to(
        memory_format=torch.channels_last
    )
    conv_bias = torch.randn(4, dtype=dtype, device=device)
    return [t.requires_grad_() for t in (x, *vectors, conv_weight, conv_bias, torch.randn_like(x))]


def step(x, weight, bias, pre_bias, conv_weight, conv_bias, residual=None, backend="triton"):
    norm = Norm(weight, bias, 3)
    return norm_act_conv2d(x, norm, conv_weight, conv_bias, 1, pre_bias, residual, backend)


def plain(x, weight, bias, pre_bias, conv_weight, conv_bias, residual=None):
    total = x + pre_bias.view(1, -1, 1, 1) + (0 if residual is None else residual)
    out = F.conv2d(F.silu(F.group_norm(total, 3, weight, bias, 1e-6)), conv_weight, conv_bias, padding=1)
    return out if residual is None else (out, total)


def test_the_gradient_of_the_sum_alone_reaches_everything_added(device):
    inputs = tensors(device)
    _, total = step(*inputs)
    dx, dpre_bias, dresidual, dweight = torch.autograd.grad(
        total.square().sum(), [inputs[0], inputs[3], inputs[6], inputs[1]], allow_unused=True
    )
    torch.testing.assert_close(dx, 2 * total)
    torch.testing.assert_close(dresidual, 2 * total)
    torch.testing.assert_close(dpre_bias, 2 * total.sum((0, 2, 3)))
    assert dweight is None


@pytest.mark.parametrize("with_residual", [False, True])
def test_the_graph_keeps_one_activation_where_the_plain_one_keeps_more(device, with_residual):
    inputs = tensors(device, torch.float32)[: 7 if with_residual else 6]

    def kept(function) -> int:
        """Bytes of distinct activations that the graph holds."""
        found = {}

        def pack(t):
            if t.ndim == 4 and t.shape[2] != t.shape[3]:  # not the convolution's weight
                found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = function(*inputs)
        assert out is not None
        return sum(found.values())

    activation = inputs[0].untyped_storage().nbytes()
    assert kept(step) == activation
    assert kept(plain) == 3 * activation  # the sum, what SiLU reads, what the convolution reads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_computes_the_convolution_in_half_precision(device, dtype):
    x, weight, bias, pre_bias, conv_weight, conv_bias, _ = tensors(device, torch.float32)
    x = x.detach().to(dtype).requires_grad_()
    inputs = [x, weight, bias, pre_bias, conv_weight, conv_bias]
    with torch.autocast(device, torch.bfloat16):
        out = step(*inputs)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out, inputs, torch.ones_like(out))
    assert [g.dtype for g in found] == [t.dtype for t in inputs]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    exact = plain(*wide)
    for ours, want in zip(found, torch.autograd.grad(exact, wide, torch.ones_like(exact)), strict=True):
        assert (ours.double() - want).norm() <= 0.03 * want.norm() + 1e-3


def test_frozen_parts_get_no_gradient_and_cost_none(device):
    inputs = tensors(device)
    for tensor in inputs[1:6]:
        tensor.requires_grad_(False)
    out, _ = step(*inputs)
    out.sum().backward()
    assert inputs[0].grad is not None
    assert [t.grad for t in inputs[1:6]] == [None] * 5


def test_without_gradients_it_is_the_two_steps(device):
    x, weight, bias, pre_bias, conv_weight, conv_bias, _ = tensors(device, torch.float32)
    with torch.no_grad(), use_backend("triton"):
        out = step(x, weight, bias, pre_bias, conv_weight, conv_bias)
        y = norm_act(x, weight, bias, 3, pre_bias=pre_bias)
    assert torch.equal(out, F.conv2d(y, conv_weight, conv_bias, padding=1))
    assert not out.requires_grad


def test_bad_arguments_are_named(device):
    x, weight, bias, _, conv_weight, conv_bias, _ = tensors(device, torch.float32)
    for backend in ("triton", "torch"):
        with pytest.raises(ValueError, match="groups is 4, which does not divide the 6 channels"):
            norm_act_conv2d(x, Norm(weight, bias, 4), conv_weight, conv_bias, backend=backend)
