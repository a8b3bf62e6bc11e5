"""`lpips_head`: the kernels (on a GPU, or in Triton's interpreter) and the native operators against
fp64.
"""

from __future__ import annotations

import pytest
import torch
from kernel_formulas import lpips_head_reference
from latentae_kernels import BackendError, lpips_head, use_backend
from torch import Tensor

BACKENDS = ("triton", "torch")


def tensors(
    shape, dtype, device, channels_last=True, parameters=None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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


def test_the_distance_is_the_mean_of_weighted_squared_differences_of_unit_vectors(device):
    a = torch.tensor([[3.0, 0.0], [4.0, 2.0]], device=device).view(1, 2, 1, 2)  # pixels (3, 4) and (0, 2)
    b = torch.tensor([[1.0, 1.0], [0.0, 0.0]], device=device).view(1, 2, 1, 2)  # both (1, 0)
    weight = torch.tensor([1.0, 10.0], device=device)
    expected = ((0.6 - 1) ** 2 + 10 * 0.8**2 + 1 + 10) / 2
    for backend in BACKENDS:
        assert lpips_head(a, b, weight, backend=backend).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_on_equal_and_on_empty_features(backend, dtype, device):
    a, _, weight, gradient = tensors((2, 16, 3, 3), dtype, device, parameters=torch.float32)
    zero = torch.zeros_like(a).requires_grad_()
    value, da, db = results(
        lpips_head, a, a.detach().clone().requires_grad_(), weight, gradient, backend=backend
    )
    assert not value.any()
    assert not da.any()
    assert not db.any()
    for pair in ((zero, zero.detach().clone().requires_grad_()), (zero, a), (a, zero)):
        assert all(
            torch.isfinite(t).all() for t in results(lpips_head, *pair, weight, gradient, backend=backend)
        )


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
    odd = (
        torch.randn(2, 6, 3, 10, device=device)[..., ::2].copy_(b.detach()).requires_grad_()
    )  # dense in no order
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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own
def test_the_operators_keep_torchs_contract(device):
    a, b, weight, gradient = tensors((2, 5, 3, 2), torch.float32, device)
    ops = torch.ops.latentae_kernels
    torch.library.opcheck(ops.lpips_head_forward, (a, b, weight, 1e-2))
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(ops.lpips_head_backward, (gradient, a, b, weight, 1e-2, *needs))


def test_a_weight_that_wants_a_gradient_gets_it_from_torch(device):
    a, b, weight, _ = tensors((2, 4, 3, 3), torch.float64, device)
    weight.requires_grad_()
    with pytest.raises(BackendError, match="weight requires a gradient"):
        lpips_head(a, b, weight, backend="triton")
    with use_backend("triton"):
        assert torch.autograd.gradcheck(lambda w: lpips_head(a, b, w, eps=1e-3), (weight,))
        with torch.no_grad():
            torch.testing.assert_close(
                lpips_head(a, b, weight, backend="triton"), lpips_head_reference(a, b, weight)
            )


def test_bad_arguments_are_named():
    a, b, weight, _ = tensors((1, 4, 2, 2), torch.float32, "cpu")
    cases: list[tuple[dict, str]] = [
        ({"a": torch.ones(1, 4, 2, 2, dtype=torch.int32)}, "a has dtype torch.int32"),
        ({"a": torch.ones(4, 2, 2)}, r"a has shape \(4, 2, 2\)"),
        ({"a": torch.ones(2, 4, 0, 2)}, r"a has shape \(2, 4, 0, 2\)"),
        ({"b": torch.ones(1, 4, 2, 3)}, r"b has shape \(1, 4, 2, 3\), expected \(1, 4, 2, 2\)"),
        ({"b": torch.ones(1, 4, 2, 2).half()}, "b has dtype torch.float16, expected torch.float32"),
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
