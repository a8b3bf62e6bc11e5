"""`lpips_head`: the kernels (on a GPU, or in Triton's interpreter) and the native operators against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentae_kernels import BackendError, lpips_head, use_backend
from latentae_kernels.reference import lpips_head_reference
from torch import Tensor

BACKENDS = ("triton", "torch")


def tensors(shape, dtype, device, channels_last=True, parameters=None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a and b, both leaves, weight, and a gradient of the result."""
    a, b = torch.randn(2, *shape, dtype=torch.float64).relu().to(device, dtype)
    if channels_last:
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    weight = torch.rand(shape[1], dtype=torch.float64).to(device, parameters or dtype)
    gradient = torch.randn(shape[0], dtype=torch.promote_types(dtype, torch.float32)).to(device)
    return a.requires_grad_(), b.clone().requires_grad_(), weight, gradient


def results(function, a, b, weight, gradient, **options) -> list[Tensor]:
    """The distances and the gradients of a and b."""
    value = function(a, b, weight, **options)
    return [value.detach(), *torch.autograd.grad(value, [t for t in (a, b) if t.requires_grad], gradient)]


def exact(a, b, weight, gradient, **options) -> list[Tensor]:
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in (a, b)]
    return results(lpips_head_reference, *wide, weight.double(), gradient.double(), **options)


def error(got: Tensor, expected: Tensor) -> float:
    return (got.double() - expected).norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("shape", [(2, 20, 5, 7), (3, 1, 2, 2), (1, 3, 1, 1), (2, 64, 9, 11), (1, 33, 1, 4)])
def test_equals_the_reference_in_fp64_with_gradients(backend, channels_last, shape, device):
    inputs = tensors(shape, torch.float64, device, channels_last)
    got = results(lpips_head, *inputs, eps=1e-4, backend=backend)
    for ours, expected in zip(got, exact(*inputs, eps=1e-4), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_the_distance_is_the_mean_of_weighted_squared_differences_of_unit_vectors(device):
    a = torch.tensor([[3.0, 0.0], [4.0, 2.0]], device=device).view(1, 2, 1, 2)  # pixels (3, 4) and (0, 2)
    b = torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=device).view(1, 2, 1, 2)  # both (1, 0)
    weight = torch.tensor([1.0, 10.0], device=device)
    expected = ((0.6 - 1) ** 2 + 10 * 0.8**2 + 1 + 10) / 2
    for backend in BACKENDS:
        assert lpips_head(a, b, weight, backend=backend).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(c, torch.bfloat16) for c in (1, 3, 20, 32, 96, 192, 320, 512)] + [(c, torch.float16) for c in (3, 96)],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_half_precision_is_the_exact_result_rounded_once(channels, dtype, channels_last, device):
    inputs = tensors((2, channels, 5, 7), dtype, device, channels_last, parameters=torch.float32)
    truths = exact(*inputs, eps=1e-4)
    fused, eager = (results(lpips_head, *inputs, eps=1e-4, backend=backend) for backend in BACKENDS)
    assert fused[0].dtype == eager[0].dtype == torch.float32
    torch.testing.assert_close(fused[0].double(), truths[0], rtol=2e-6, atol=1e-7)
    for ours, theirs, truth in list(zip(fused, eager, truths, strict=True))[1:]:
        assert ours.dtype == dtype
        # what is left of e - u sum(e u) in fp32, where u is all there is: everywhere with one channel
        floor = 1e-6 * truth.norm().item() + 1e-6
        assert error(ours, truth) <= 1.05 * error(truth.to(dtype), truth) + floor
        assert error(ours, truth) <= error(theirs, truth) + floor


@pytest.mark.parametrize("channels", [3, 96, 512])
@pytest.mark.parametrize("channels_last", [True, False])
def test_single_precision_is_near_fp64(channels, channels_last, device):
    inputs = tensors((2, channels, 5, 7), torch.float32, device, channels_last)
    for ours, truth in zip(results(lpips_head, *inputs, eps=1e-4, backend="triton"), exact(*inputs, eps=1e-4), strict=True):
        assert error(ours, truth) <= 2e-6 * truth.norm().item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_on_equal_and_on_empty_features(backend, dtype, device):
    a, _, weight, gradient = tensors((2, 16, 3, 3), dtype, device, parameters=torch.float32)
    zero = torch.zeros_like(a).requires_grad_()
    value, da, db = results(lpips_head, a, a.detach().clone().requires_grad_(), weight, gradient, backend=backend)
    assert not value.any()
    assert not da.any()
    assert not db.any()
    for pair in ((zero, zero.detach().clone().requires_grad_()), (zero, a), (a, zero)):
        assert all(torch.isfinite(t).all() for t in results(lpips_head, *pair, weight, gradient, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1])
def test_one_map_can_be_a_constant(backend, which, device):
    a, b, weight, gradient = tensors((2, 6, 3, 5), torch.float32, device)
    both = results(lpips_head, a, b, weight, gradient, backend=backend)
    pair = [t.detach().requires_grad_(index == which) for index, t in enumerate((a, b))]
    value, only = results(lpips_head, *pair, weight, gradient, backend=backend)
    assert torch.equal(value, both[0])
    torch.testing.assert_close(only, both[1 + which])


def test_a_gradient_that_nobody_needs_is_not_allocated(device):
    a, b, weight, gradient = tensors((2, 6, 3, 5), torch.float32, device)
    backward = torch.ops.latentae_kernels.lpips_head_backward
    with torch.no_grad():
        da, db = backward(gradient, a, b, weight, 1e-10, True, False)
        assert (da.shape, db.numel()) == (a.shape, 0)
        da, db = backward(gradient, a, b, weight, 1e-10, False, True)
        assert (da.numel(), db.shape) == (0, b.shape)


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_orders_can_differ(backend, device):
    a, b, weight, gradient = tensors((2, 6, 3, 5), torch.float32, device)
    expected = results(lpips_head, a, b, weight, gradient, backend=backend)
    odd = torch.randn(2, 6, 3, 10, device=device)[..., ::2].copy_(b.detach()).requires_grad_()  # dense in no order
    for pair in (
        (a, b.detach().contiguous().requires_grad_()),
        (a.detach().contiguous().requires_grad_(), b),
        (a, odd),
        (odd, a),
    ):
        got = results(lpips_head, *pair, weight, gradient, backend=backend)
        if pair[0] is odd:
            got = [got[0], got[2], got[1]]
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend, device):
    a, b, weight, gradient = tensors((0, 4, 3, 3), torch.bfloat16, device)
    value, da, db = results(lpips_head, a, b, weight, gradient, backend=backend)
    assert (value.shape, value.dtype) == ((0,), torch.float32)
    assert da.shape == db.shape == a.shape


def test_first_and_second_derivatives_are_those_of_the_function(device):
    a, b, weight, _ = tensors((2, 3, 1, 2), torch.float64, device)
    a, b = ((t.detach() + 0.5).requires_grad_() for t in (a, b))

    def function(a, b):
        return lpips_head(a, b, weight, eps=1e-3, backend="triton")

    assert torch.autograd.gradcheck(function, (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda a: function(a, b.detach()), (a,), fast_mode=True)


def test_second_derivatives_where_the_gradient_depends_on_the_features_too(device):
    a, b, weight, _ = tensors((2, 6, 3, 3), torch.float64, device)

    def penalty(function, **options):
        # the incoming gradient is itself a function of a and b, as in every real network
        (gradient,) = torch.autograd.grad(function(a, b, weight, eps=1e-2, **options).sin().sum(), a, create_graph=True)
        return torch.autograd.grad((9 * gradient).square().sum(), (a, b))

    for ours, expected in zip(penalty(lpips_head, backend="triton"), penalty(lpips_head_reference), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels_last", [True, False])
def test_two_runs_are_equal_to_the_bit(channels_last, device):
    inputs = tensors((2, 48, 13, 11), torch.float32, device, channels_last)
    first, second = (results(lpips_head, *inputs, backend="triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_operators_keep_torchs_contract(channels_last, device):
    a, b, weight, gradient = tensors((2, 5, 3, 2), torch.float32, device, channels_last)
    ops = torch.ops.latentae_kernels
    torch.library.opcheck(ops.lpips_head_forward, (a, b, weight, 1e-2))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.lpips_head_backward, (gradient, a, b, weight, 1e-2, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend, device):
    inputs = tensors((2, 5, 3, 4), torch.float32, device)
    compiled = torch.compile(lpips_head, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(
        results(compiled, *inputs, eps=1e-4, backend=backend), results(lpips_head_reference, *inputs, eps=1e-4), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


class Head(torch.nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return lpips_head(a, b, a.new_ones(a.shape[1]))


def test_an_exported_model_shows_standard_operators():
    with use_backend("triton"):
        program = torch.export.export(Head(), (torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)))
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls
    assert not {call for call in calls if "latentae" in call}


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_half_precision_gradients_and_a_single_precision_distance(backend, device):
    inputs = tensors((2, 8, 3, 3), torch.bfloat16, device, parameters=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        value, da, db = results(lpips_head, *inputs, backend=backend)
    assert (value.dtype, da.dtype, db.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(value.double(), exact(*inputs)[0], rtol=1e-5, atol=1e-6)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9)),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_shape(shape, channels_last, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tensors(shape, dtype, device, channels_last, parameters=torch.float32)
    got = results(lpips_head, *inputs, eps=1e-2, backend="triton")
    truths = exact(*inputs, eps=1e-2)
    for ours, truth in zip(got, truths, strict=True):
        largest = max(truth.abs().max().item(), 1e-2) if truth.numel() else 1
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=(2 * torch.finfo(ours.dtype).eps + 1e-5) * largest)


def test_a_weight_that_wants_a_gradient_gets_it_from_torch(device):
    a, b, weight, _ = tensors((2, 4, 3, 3), torch.float64, device)
    weight.requires_grad_()
    with pytest.raises(BackendError, match="weight requires a gradient"):
        lpips_head(a, b, weight, backend="triton")
    with use_backend("triton"):
        assert torch.autograd.gradcheck(lambda w: lpips_head(a, b, w, eps=1e-3), (weight,))
        with torch.no_grad():
            torch.testing.assert_close(lpips_head(a, b, weight, backend="triton"), lpips_head_reference(a, b, weight))


def test_more_channels_than_the_kernels_take(device):
    a, b, weight, _ = tensors((1, 4097, 1, 2), torch.float32, device)
    with pytest.raises(BackendError, match="4097 channels, the kernels take up to 4096"):
        lpips_head(a, b, weight, backend="triton")
    with use_backend("triton"):
        torch.testing.assert_close(lpips_head(a, b, weight), lpips_head_reference(a, b, weight))
    a, b, weight = a[:, :4096], b[:, :4096], weight[:4096]
    torch.testing.assert_close(lpips_head(a, b, weight, backend="triton"), lpips_head_reference(a, b, weight))


def test_bad_arguments_are_named():
    a, b, weight, _ = tensors((1, 4, 2, 2), torch.float32, "cpu")
    cases: list[tuple[dict, str]] = [
        ({"a": torch.ones(1, 4, 2, 2, dtype=torch.int32)}, "a has dtype torch.int32"),
        ({"a": torch.ones(4, 2, 2)}, r"a has shape \(4, 2, 2\)"),
        ({"a": torch.ones(2, 4, 0, 2)}, r"a has shape \(2, 4, 0, 2\)"),
        ({"b": torch.ones(1, 4, 2, 3)}, r"b has shape \(1, 4, 2, 3\), expected \(1, 4, 2, 2\)"),
        ({"b": torch.ones(1, 4, 2, 2).half()}, "b has dtype torch.float16 beside a in torch.float32"),
        ({"b": torch.ones(1, 4, 2, 2, device="meta")}, "b is on meta"),
        ({"weight": torch.ones(5)}, r"weight has shape \(5,\), expected \(4,\)"),
        ({"weight": torch.ones(4).bfloat16()}, "weight has dtype torch.bfloat16"),
        ({"weight": torch.ones(4, device="meta")}, "weight is on meta"),
        ({"backend": "cuda"}, "unknown backend 'cuda'"),
        ({"eps": 0.0}, "eps is 0.0"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            lpips_head(**{"a": a, "b": b, "weight": weight, **wrong})
