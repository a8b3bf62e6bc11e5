from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from kernel_formulas import norm_act_reference
from latentae_kernels import BackendError, norm_act
from latentae_kernels.norm_act import launch
from latentae_kernels.norm_act.kernels import tile_offsets

HALF = (torch.bfloat16, torch.float16)
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def tensors(channels, shape, dtype, device="cpu", channels_last=True, parameters=None):
    """x, weight, bias, pre_bias, residual for a shape (N, *spatial)."""
    x = torch.randn(shape[0], channels, *shape[1:], dtype=dtype, device=device)
    if channels_last and x.ndim in FORMATS:
        x = x.to(memory_format=FORMATS[x.ndim])
    weight, bias, pre_bias = (
        torch.randn(channels, dtype=parameters or dtype, device=device) for _ in range(3)
    )
    return x, weight, bias, pre_bias, torch.randn_like(x)


def both_passes(function, x, weight, bias, groups, *, pre_bias=None, residual=None, gradients, **options):
    """Outputs and the gradients of every tensor given."""
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias, pre_bias, residual) if t is not None]
    rest = iter(inputs[3:])
    pre_bias = next(rest) if pre_bias is not None else None
    residual = next(rest) if residual is not None else None
    out = function(*inputs[:3], groups, pre_bias=pre_bias, residual=residual, **options)
    outs = out if residual is not None else (out,)
    return [*outs, *torch.autograd.grad(outs, inputs, gradients[: len(outs)])]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_never_worse_than_eager(device, dtype):
    x, weight, bias, pre_bias, residual = tensors(96, (2, 9, 11), dtype, device)
    gradients = (torch.randn_like(x), torch.randn_like(x))
    double = {
        "pre_bias": pre_bias.double(),
        "residual": residual.double(),
        "gradients": tuple(g.double() for g in gradients),
    }
    # the sum is stored rounded, and that is what is normalized: so the exact result starts from it
    total = (x.float() + pre_bias.float().view(1, -1, 1, 1) + residual.float()).to(dtype).double()
    y = norm_act_reference(total, weight.double(), bias.double(), 32)
    exact = both_passes(norm_act_reference, x.double(), weight.double(), bias.double(), 32, **double)
    fused, eager = (
        both_passes(
            norm_act,
            x,
            weight,
            bias,
            32,
            pre_bias=pre_bias,
            residual=residual,
            gradients=gradients,
            backend=backend,
        )
        for backend in ("triton", "torch")
    )
    for index, want in enumerate([y, total, *exact[2:]]):
        errors = [(result[index].double() - want).square().mean().sqrt().item() for result in (fused, eager)]
        assert errors[0] <= 1.02 * errors[1] + 1e-9, index
    ideal = (y.to(dtype).double() - y).square().mean().sqrt().item()
    assert (fused[0].double() - y).square().mean().sqrt().item() <= 1.05 * ideal


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 33, 65)])  # in registers, and in chunks
@pytest.mark.parametrize("ratio", [300.0, 3000.0])
def test_statistics_survive_a_mean_far_above_the_deviation(device, ratio, shape):
    x, weight, bias, *_ = tensors(16, shape, torch.float32, device)
    x = x + ratio
    exact = norm_act_reference(x.double(), weight.double(), bias.double(), 4)
    fused = norm_act(x, weight, bias, 4, backend="triton")
    eager = F.silu(F.group_norm(x, 4, weight, bias, 1e-6))
    error, native = ((y.double() - exact).abs().max().item() for y in (fused, eager))
    assert error <= 2e-6 * ratio  # what a mean stored in fp32 leaves: 2^-24 of it, times gamma
    assert error <= 2 * native + 1e-5


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("channels_last", [True, False])
def test_both_strategies_agree(device, groups, channels_last, monkeypatch):
    x, weight, bias, pre_bias, residual = tensors(16, (2, 6, 10), torch.float32, device, channels_last)
    options = {
        "pre_bias": pre_bias,
        "residual": residual,
        "gradients": (torch.randn_like(x), torch.randn_like(x)),
    }
    problem = launch.Problem(2, 16, 60, groups, 4, channels_last)
    resident = launch.choose_config(problem, 1, False)
    assert resident.resident_groups
    assert not launch.choose_config(problem, 10_000, False).resident_groups
    in_registers = both_passes(norm_act, x, weight, bias, groups, backend="triton", **options)
    chunked = launch.Config(block_hw=8, block_c=8, chunk=24, num_warps=1)
    monkeypatch.setattr(launch, "choose_config", lambda *_: chunked)
    for one, other in zip(
        in_registers, both_passes(norm_act, x, weight, bias, groups, backend="triton", **options), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_the_operators_are_well_registered(device):
    ops = torch.ops.latentae_kernels
    x, weight, bias, pre_bias, residual = tensors(6, (2, 3, 5), torch.float32, device)
    grads = [t.clone().requires_grad_() for t in (x, residual, weight, bias, pre_bias)]
    torch.library.opcheck(ops.norm_act_forward, (*grads, 3, 1e-6, "silu"))
    torch.library.opcheck(ops.norm_act_forward, (grads[0], None, *grads[2:4], None, 3, 1e-6, "identity"))
    _, _, mean, rstd = ops.norm_act_forward(x, None, weight, bias, pre_bias, 3, 1e-6, "silu")
    torch.library.opcheck(ops.norm_act_apply, (x, weight, bias, pre_bias, mean, rstd, 3, "silu"))
    torch.library.opcheck(
        ops.norm_act_backward,
        (grads[1], grads[0], x, *grads[2:4], pre_bias, mean, rstd, 3, 1e-6, "silu", True),
    )


def test_strides_that_are_neither_order_are_copied_once(device):
    x, weight, bias, *_ = tensors(8, (2, 6, 4), torch.float32, device)
    odd = x.transpose(2, 3)[:, :, ::2].detach().requires_grad_()
    y = norm_act(odd, weight, bias, 2, backend="triton")
    expected = norm_act_reference(odd.double(), weight.double(), bias.double(), 2)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    tangent = torch.randn(y.shape, device=device).contiguous()  # rows first, next to channels last
    torch.testing.assert_close(
        *(torch.autograd.grad(out, odd, tangent.to(out.dtype))[0] for out in (y, expected)),
        rtol=1e-4,
        atol=1e-5,
    )


@triton.jit
def addresses(out_ptr, n, first, HW, C: tl.constexpr, NHWC: tl.constexpr):
    rows = tl.arange(0, 4)
    cols = tl.arange(0, 4)
    base, offs = tile_offsets(n.to(tl.int64), first.to(tl.int64), rows, cols + C - 4, HW, C, NHWC)
    tl.store(out_ptr + rows[:, None] * 4 + cols[None, :], base + offs)


def test_addresses_go_past_two_to_the_31(device):
    out = torch.empty(4, 4, dtype=torch.int64, device=device)
    n, first, size, channels = 40, 4096 * 4096 - 4, 4096 * 4096, 512
    for channels_last in (True, False):
        addresses[(1,)](out, n, first, size, C=channels, NHWC=channels_last)
        for row, col in itertools.product(range(4), range(4)):
            p, c = first + row, channels - 4 + col
            inner = p * channels + c if channels_last else c * size + p
            assert out[row, col].item() == n * channels * size + inner


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_a_gpu():
    x = torch.randn(1, 128, 4096, 4097, device="cuda", dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    weight, bias = torch.randn(2, 128, device="cuda")
    y = norm_act(x, weight, bias, 32, backend="triton")
    for group in (0, 31):
        channels = slice(4 * group, 4 * group + 4)
        exact = norm_act_reference(x[:, channels].float(), weight[channels], bias[channels], 1)
        torch.testing.assert_close(y[:, channels].float(), exact, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("name", ["weight", "bias", "pre_bias"])
def test_bad_channel_vectors_are_named(name):
    x, weight, bias, pre_bias, _ = tensors(8, (1, 2, 2), torch.float32)
    given = {"weight": weight, "bias": bias, "pre_bias": pre_bias}
    for value, message in [
        (torch.randn(7), r"has shape \(7,\), expected \(8,\)"),
        (given[name].double(), "has dtype torch.float64, expected torch.float32"),
        (given[name].half(), "has dtype torch.float16, expected torch.float32"),
        (given[name].to("meta"), "is on meta, expected cpu"),
    ]:
        with pytest.raises(ValueError, match=f"norm_act: {name} {message}"):
            norm_act(x, groups=2, **(given | {name: value}))


def test_what_can_not_run_says_so(monkeypatch):
    x, weight, bias, _, residual = tensors(8, (1, 2, 2), torch.float32)
    for arguments, message in [
        ({"groups": 3}, "groups is 3, which does not divide the 8 channels of x"),
        ({"groups": 0}, "groups is 0"),
        ({"groups": 2, "act": "relu"}, "unknown act 'relu'; use 'silu' or 'identity'"),
        ({"groups": 2, "backend": "cuda"}, "unknown backend 'cuda'"),
        ({"groups": 2, "residual": residual[:, :, :1]}, "residual has shape"),
        (
            {"groups": 2, "residual": residual.half()},
            "residual has dtype torch.float16, expected torch.float32",
        ),
        ({"groups": 2, "residual": residual.to("meta")}, "residual is on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            norm_act(x, weight, bias, **arguments)
    with pytest.raises(ValueError, match=r"x has dtype torch.int64, expected a floating-point dtype"):
        norm_act(x.long(), weight, bias, 2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="x is on the CPU, where kernels run only in Triton's interpreter"):
        norm_act(x, weight, bias, 2, backend="triton")
