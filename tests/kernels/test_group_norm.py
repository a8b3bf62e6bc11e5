"""GroupNorm on a CPU against fp64: large means, many pixels, flat regions, odd layouts, and what
can't branch on values.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from latentae_kernels import Norm, channel_moments, conv3x3, group_norm, norm_act
from latentae_kernels.norm_act.group_norm import _block, _Blocks
from torch.autograd import forward_ad

EPS = 1e-6
GOAL = 2e-5


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def last(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def parameters(channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(2, channels, generator=generator)
    return 1 + 0.1 * weight, 0.1 * bias


def exact(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.group_norm(x.double().contiguous(), groups, weight.double(), bias.double(), EPS)


def errors(x: torch.Tensor, groups: int, function=group_norm) -> list[float]:
    """Of y, dx, dweight and dbias."""
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours = [t.clone().requires_grad_() for t in (x, *parameters(x.shape[1]))]
    wide = [t.detach().double().requires_grad_() for t in ours]
    y, y64 = function(ours[0], groups, *ours[1:], EPS), exact(wide[0], groups, *wide[1:])
    found = y, *torch.autograd.grad(y, ours, last(dy))
    return [
        error(a, b) for a, b in zip(found, (y64, *torch.autograd.grad(y64, wide, dy.double())), strict=True)
    ]


def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return last(mean + torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def with_values(x: torch.Tensor, at: tuple, value: float) -> torch.Tensor:
    x = x.clone()
    x[at] += value
    return x


def flat(size: int) -> torch.Tensor:
    """Nine tenths of every channel are one value."""
    x = normal(1, 32, size, size)
    x[:, :, : 9 * size // 10] = x[:, :, :1, :1] + 1
    return x


CASES = {
    "mean 300": (normal(1, 320, 3, 11, mean=300), 32),
    "mean 30": (normal(1, 64, 16, 16, mean=30), 32),
    "mean 30, many pixels": (normal(2, 16, 64, 64, mean=30), 4),
    "one group": (with_values(normal(2, 16, 12, 12), (slice(None), slice(0, 4)), 300), 4),
    "one sample": (with_values(normal(3, 16, 12, 12), (1,), 300), 4),
    "one channel": (with_values(normal(2, 16, 12, 12), (slice(None), 3), 1e4), 4),
    "outlier rows": (
        with_values(normal(2, 16, 80, 80, mean=100), (..., slice(3, None, 17), slice(None)), 1e4),
        4,
    ),
    "one pixel": (with_values(normal(2, 16, 80, 80, mean=100), (0, 3, 5, 5), 1e6), 4),
    "small scale": (1e-3 + 1e-6 * normal(2, 16, 12, 12), 4),
    "groups = channels": (normal(2, 16, 20, 20, mean=30), 16),
    "one group only": (normal(2, 16, 70, 70, mean=30), 1),
    "one channel only": (normal(2, 1, 70, 70, mean=30), 1),
    "odd": (normal(2, 8, 67, 71, mean=3), 4),
    "one place": (normal(3, 16, 1, 1, mean=30), 4),
    "flat, few pixels": (flat(32), 8),
    "flat, many pixels": (flat(128), 8),
    "many pixels": (normal(1, 4, 1024, 1024), 1),
    "channels first": (normal(1, 320, 3, 11, mean=300).contiguous(), 32),
}


@pytest.mark.parametrize(("x", "groups"), CASES.values(), ids=CASES)
def test_both_passes_are_right(x, groups):
    assert max(errors(x, groups)) <= GOAL


def test_the_native_operator_is_not():
    """Else this file shows nothing, and the operator can stand alone again."""
    assert errors(*CASES["mean 300"], function=F.group_norm)[0] > GOAL


@pytest.mark.parametrize("size", [9, 70])  # the operator, and in blocks
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :, 1:-1, 1:-1],
        lambda x: x[:, ::2, ::2],
        lambda x: x[:, 4:12].transpose(2, 3),
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.flatten(2),
        lambda x: last(x).unsqueeze(2),
    ],
)
def test_any_layout(size, view):
    x = view(normal(2, 16, size, size, mean=30))
    weight, bias = parameters(x.shape[1])
    assert error(group_norm(x, 2, weight, bias, EPS), exact(x, 2, weight, bias)) <= GOAL


def test_channels_last_comes_out_as_it_went_in():
    for x in (normal(2, 16, 9, 9), normal(2, 16, 70, 70, mean=30)):
        assert group_norm(x, 4, *parameters(16), EPS).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_parameters", [True, False])
@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (1, 2, 260, 260)])
def test_half_precision_errs_by_its_rounding_only(dtype, wide_parameters, shape):
    x = normal(*shape, mean=30).to(dtype)
    weight, bias = (t.to(torch.float32 if wide_parameters else dtype) for t in parameters(x.shape[1]))
    y, want = group_norm(x, 2, weight, bias, EPS), exact(x, 2, weight, bias)
    assert y.dtype == dtype
    assert error(y, want) <= 1.1 * error(want.to(dtype), want)


@pytest.mark.parametrize("size", [9, 70])
@pytest.mark.parametrize("value", [0.0, 0.1, 300.0])
def test_a_constant_gives_the_bias_and_finite_gradients(size, value):
    x = last(torch.full((2, 8, size, size), value)).requires_grad_()
    weight, bias = parameters(8)
    y = group_norm(x, 4, weight, bias, EPS)
    torch.testing.assert_close(y, bias.view(1, -1, 1, 1).expand_as(y), rtol=0, atol=1e-6)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.isfinite().all()


@pytest.mark.parametrize("size", [4, 80])
def test_an_empty_batch_has_a_gradient(size):
    x = torch.empty(0, 8, size, size).requires_grad_()
    group_norm(last(x), 4, *parameters(8), EPS).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


def test_a_bad_value_stays_in_its_group():
    y = group_norm(
        with_values(normal(2, 8, 70, 70, mean=30), (0, 0, 0, 0), float("nan")), 4, *parameters(8), EPS
    )
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().all()


def test_the_blocks_have_first_and_second_derivatives():
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 2, 3, 4), (4,), (4,))
    ]
    function = lambda *tensors: _Blocks.apply(*tensors, 2, 1e-3)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("size", [9, 70])
def test_second_derivatives_are_right_too(size):
    def slopes(function, x, *rest):
        (dx,) = torch.autograd.grad(function(x, 4, *rest, EPS).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *rest])

    ours = [t.requires_grad_() for t in (normal(2, 16, size, size, mean=30), *parameters(16))]
    wide = [t.detach().double().requires_grad_() for t in ours]
    found = slopes(group_norm, *ours)
    expected = slopes(lambda x, groups, weight, bias, _: exact(x, groups, weight, bias), *wide)
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) <= GOAL


def test_sizes_are_cut_near_a_thousand_pixels():
    assert [_block(pixels) for pixels in (4096, 1024 * 1024, 67 * 71, 257 * 263, 65537)] == [
        1024,
        1024,
        71,
        263,
        65537,
    ]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (torch.nn.Parameter(t) for t in parameters(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return norm_act(x, self.weight, self.bias, 4, EPS, "identity", backend="torch")


@pytest.mark.parametrize(
    "x", [normal(2, 16, 9, 9, mean=300), normal(2, 16, 70, 70, mean=30)], ids=["few", "many"]
)
def test_right_where_values_cannot_be_branched_on(x):
    layer, want = Layer(), exact(x, 4, *parameters(16))
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert error(compiled(x), want) <= GOAL
    torch._dynamo.reset()
    assert error(torch.func.vmap(layer)(x.unsqueeze(1)).squeeze(1), want) <= GOAL


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated"
)  # torch's own, at the first forward-mode gradient
@pytest.mark.parametrize(
    "x", [normal(2, 16, 9, 9, mean=300), normal(2, 16, 70, 70, mean=30)], ids=["few", "many"]
)
def test_forward_mode_is_right(x):
    tangents = {}
    for name, function, at in (
        ("ours", Layer(), x),
        ("exact", lambda t: exact(t, 4, *parameters(16)), x.double()),
    ):
        with forward_ad.dual_level():
            tangents[name] = forward_ad.unpack_dual(function(forward_ad.make_dual(at, at.sin()))).tangent
    assert error(tangents["ours"], tangents["exact"]) <= GOAL


def test_an_export_shows_the_operator():
    program = torch.export.export(Layer(), (normal(2, 16, 70, 70),))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [name for name in names if "norm" in name] == ["aten.group_norm.default"]
    assert not [name for name in names if "sub" in name or "mean" in name]


@pytest.mark.parametrize("method", ["native", "winograd"])
@torch.no_grad()
def test_the_convolution_that_normalizes_reads_the_same(method):
    x, (weight, bias) = normal(1, 16, 40, 40, mean=300), parameters(16)
    kernel = torch.randn(16, 16, 3, 3, generator=torch.Generator().manual_seed(3))
    y = conv3x3(x, last(kernel), None, Norm(weight, bias, 4, EPS), method=method)
    assert error(y, F.conv2d(F.silu(exact(x, 4, weight, bias)), kernel.double(), padding=1)) <= GOAL


@pytest.mark.parametrize("shape", [(3, 16, 5, 7), (2, 16, 200, 300)])
@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_moments_of_channels(shape, mean):
    x = with_values(normal(*shape, mean=mean), (slice(None), 2), 1e3)
    found, wide = channel_moments(x), x.double()
    torch.testing.assert_close(found[0], wide.mean((2, 3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], wide.var((2, 3), correction=0), rtol=2e-6, atol=0)
