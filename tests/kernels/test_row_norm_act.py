"""`row_norm_act`: the kernels (on a GPU, or in Triton's interpreter) and the native operators against fp64."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from latentae_kernels import BackendError, row_norm_act, use_backend
from latentae_kernels.reference import row_norm_act_reference
from latentae_kernels.row_norm_act_kernels import row_tile
from torch import Tensor

NORMS, ACTS, BACKENDS = ("rms", "layer"), ("silu", "identity"), ("triton", "torch")


def tensors(shape, dtype, device, channels_last=True, parameters=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(
    ("shape", "with_bias"),
    [((2, 20, 5, 7), True), ((2, 6, 3, 5), False), ((3, 1, 2, 2), True), ((1, 3, 1, 1), True), ((2, 5, 9), True),
     ((2, 4, 2, 3, 5), False), ((4, 6), True)],
)  # fmt: skip
def test_equals_the_reference_in_fp64_with_gradients(backend, norm, act, channels_last, shape, with_bias, device):
    x, weight, bias, dy = tensors(shape, torch.float64, device, channels_last)
    inputs = (x, weight, bias if with_bias else None, dy)
    got = results(row_norm_act, *inputs, norm=norm, act=act, backend=backend)
    for ours, expected in zip(got, exact(*inputs, norm=norm, act=act), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(c, torch.bfloat16) for c in (1, 3, 20, 32, 96, 192, 320, 512)] + [(c, torch.float16) for c in (3, 96)],
)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_half_precision_is_the_exact_result_rounded_once(channels, dtype, channels_last, norm, device):
    inputs = tensors((2, channels, 5, 7), dtype, device, channels_last, parameters=torch.float32)
    expected = exact(*inputs, norm=norm)
    fused = results(row_norm_act, *inputs, norm=norm, backend="triton")
    x, weight, bias, dy = inputs
    halves = (x, weight.detach().to(dtype).requires_grad_(), bias.detach().to(dtype).requires_grad_(), dy)
    eager = results(row_norm_act, *halves, norm=norm, backend="torch")
    for ours, theirs, truth in list(zip(fused, eager, expected, strict=True))[:2]:  # y and dx
        assert ours.dtype == dtype
        floor = truth.abs().max().item() * 1e-6  # LayerNorm of one channel is exactly its bias, its gradient exactly zero
        assert error(ours, truth) <= 1.05 * error(truth.to(dtype), truth) + floor
        assert error(ours, truth) <= error(theirs, truth) + floor
    for ours, truth in list(zip(fused, expected, strict=True))[2:]:
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=5e-6 * math.sqrt(70))


@pytest.mark.parametrize("channels", [1, 3, 20, 96, 512])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("norm", NORMS)
def test_single_precision_is_near_fp64(channels, channels_last, norm, device):
    inputs = tensors((2, channels, 5, 7), torch.float32, device, channels_last)
    eager = results(row_norm_act, *inputs, norm=norm, backend="torch")
    fused = results(row_norm_act, *inputs, norm=norm, backend="triton")
    for ours, theirs, truth in zip(fused, eager, exact(*inputs, norm=norm), strict=True):
        # 1 / std of one channel can be anything, and the input's gradient is then a difference of huge numbers: eager's as well
        assert error(ours, truth) <= max(1e-6 * max(truth.norm().item(), 1), 2 * error(theirs, truth))


@pytest.mark.parametrize("channels_last", [True, False])
def test_layer_norm_keeps_its_digits_where_the_mean_is_far_above_the_spread(channels_last, device):
    x, weight, bias, dy = tensors((2, 96, 5, 5), torch.float32, device, channels_last)
    x = (x.detach() + 3000).requires_grad_()
    got = results(row_norm_act, x, weight, bias, dy, norm="layer", backend="triton")
    for ours, truth in zip(got, exact(x, weight, bias, dy, norm="layer"), strict=True):
        assert error(ours, truth) < 1e-6 * truth.norm().item()


def test_many_tiles_share_a_program_and_none_is_left_out(device):
    inputs = tensors((2, 64, 33, 31), torch.float32, device)
    for ours, truth in zip(results(row_norm_act, *inputs, backend="triton"), exact(*inputs), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=5e-6 * truth.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_order_is_kept_and_a_gradient_in_the_other_order_is_taken(backend, channels_last, device):
    x, weight, bias, dy = tensors((2, 6, 3, 5), torch.float32, device, channels_last)
    y, dx, *_ = results(row_norm_act, x, weight, bias, dy, backend=backend)
    assert y.stride() == x.stride()
    other = dy.contiguous() if channels_last else dy.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(results(row_norm_act, x, weight, bias, other, backend=backend)[1], dx)
    sliced = torch.randn(2, 6, 3, 10, device=device)[..., ::2]  # dense in no order
    torch.testing.assert_close(row_norm_act(sliced, weight, bias, backend=backend), row_norm_act_reference(sliced, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)])
def test_an_empty_batch_has_empty_results_and_zero_parameter_gradients(backend, shape, device):
    x, weight, bias, dy = tensors(shape, torch.float32, device)
    y, dx, dweight, dbias = results(row_norm_act, x, weight, bias, dy, backend=backend)
    assert y.shape == dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@pytest.mark.parametrize(("norm", "act"), [("rms", "silu"), ("layer", "silu"), ("layer", "identity")])
def test_first_and_second_derivatives_are_those_of_the_function(norm, act, device):
    x, weight, bias, _ = tensors((2, 3, 1, 2), torch.float64, device)

    def function(x, weight, bias):
        return row_norm_act(x, weight, bias, norm=norm, act=act, backend="triton")

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_where_the_gradient_depends_on_x_too(norm, device):
    x, weight, bias, _ = tensors((2, 6, 3, 3), torch.float64, device)

    def penalty(function, **options):
        # the incoming gradient is itself a function of x, as in every real network
        (gradient,) = torch.autograd.grad(function(x, weight, bias, norm=norm, **options).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, weight, bias))

    for ours, expected in zip(penalty(row_norm_act, backend="triton"), penalty(row_norm_act_reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels_last", [True, False])
def test_two_runs_are_equal_to_the_bit(channels_last, device):
    inputs = tensors((2, 48, 19, 17), torch.bfloat16, device, channels_last, parameters=torch.float32)
    first, second = (results(row_norm_act, *inputs, norm="layer", backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize(("channels_last", "with_bias"), [(True, True), (False, False)])
def test_the_operators_keep_torchs_contract(channels_last, with_bias, device):
    x, weight, bias, dy = tensors((2, 5, 3, 2), torch.float32, device, channels_last)
    bias = bias if with_bias else None
    ops = torch.ops.latentae_kernels
    torch.library.opcheck(ops.row_norm_act_forward, (x, weight, bias, 1e-6, "layer", "silu"))
    for parameters in (True, False):
        torch.library.opcheck(ops.row_norm_act_backward, (dy, x, weight, bias, 1e-6, "rms", "silu", parameters))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend, device):
    inputs = tensors((2, 5, 3, 4), torch.float32, device)
    compiled = torch.compile(row_norm_act, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        results(compiled, *inputs, norm="layer", backend=backend),
        results(row_norm_act_reference, *inputs, norm="layer"),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class Normalized(torch.nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.weight = torch.nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return row_norm_act(x, self.weight, None, norm=self.norm)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("norm", NORMS)
def test_an_exported_model_shows_standard_operators(norm):
    x = torch.randn(1, 4, 3, 3)
    with use_backend("triton"):
        program = torch.export.export(Normalized(norm), (x,))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls
    assert not {call for call in calls if "latentae" in call}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_keeps_half_precision_activations_beside_single_precision_parameters(backend, norm, device):
    x, weight, bias, dy = tensors((2, 8, 3, 3), torch.bfloat16, device, parameters=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        y, dx, dweight, dbias = results(row_norm_act, x, weight, bias, dy, norm=norm, backend=backend)
    assert (y.dtype, dx.dtype, dweight.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    torch.testing.assert_close(y.double(), exact(x, weight, bias, dy, norm=norm)[0], rtol=1e-2, atol=1e-2)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    channels_last=st.booleans(),
    norm=st.sampled_from(NORMS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape(shape, channels_last, norm, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tensors(shape, dtype, device, channels_last, parameters=torch.float32)
    tolerance = 2 * torch.finfo(dtype).eps + 2e-5
    for ours, truth in zip(results(row_norm_act, *inputs, norm=norm, backend="triton"), exact(*inputs, norm=norm), strict=True):
        largest = max(truth.abs().max().item(), 1) if truth.numel() else 1
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=tolerance * largest)


@triton.jit
def where(index, HW, base_ptr, last_ptr, C: tl.constexpr, NHWC: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    _, base, offsets, mask = row_tile(index, HW, C, NHWC, ROWS, BLOCK_C)
    tl.store(base_ptr, base)
    tl.store(last_ptr, tl.max(tl.max(tl.where(mask, offsets, 0).to(tl.int64), 1), 0))


@pytest.mark.parametrize("channels_last", [True, False])
def test_addresses_go_past_32_bits(channels_last, device):
    """Three images of 2048 x 2049 pixels and 512 channels: more than 2^31 elements each, too many to hold here."""
    channels, pixels, rows = 512, 2048 * 2049, 8
    tiles = pixels // rows
    base, last = torch.zeros(2, dtype=torch.int64, device=device).unbind(0)
    where[(1,)](2 * tiles + tiles - 1, pixels, base, last, C=channels, NHWC=channels_last, ROWS=rows, BLOCK_C=512)
    first = pixels - rows
    assert base.item() == 2 * channels * pixels + (first * channels if channels_last else first)
    assert last.item() == ((rows - 1) * channels + channels - 1 if channels_last else (channels - 1) * pixels + rows - 1)


def test_more_channels_than_the_kernels_take(device):
    x, weight, bias, _ = tensors((1, 4097, 1, 2), torch.float32, device)
    with pytest.raises(BackendError, match="4097 channels, the kernels take up to 4096"):
        row_norm_act(x, weight, bias, backend="triton")
    with use_backend("triton"):
        torch.testing.assert_close(row_norm_act(x, weight, bias), row_norm_act_reference(x, weight, bias))
    torch.testing.assert_close(
        row_norm_act(x[:, :4096], weight[:4096], backend="triton"), row_norm_act_reference(x[:, :4096], weight[:4096])
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
