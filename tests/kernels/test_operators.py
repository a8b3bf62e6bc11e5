"""What every operator with kernels promises, on a GPU or in Triton's interpreter: results,
derivatives, compilation, export, autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_formulas import lpips_head_reference, norm_act_reference, row_norm_act_reference
from latentae_kernels import (
    BackendError,
    Norm,
    lpips_head,
    norm_act,
    norm_act_conv2d,
    row_norm_act,
    use_backend,
)
from torch import Tensor

KEYWORDS = {"p": "pre_bias", "r": "residual", "w": "conv_weight", "b": "conv_bias"}


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


@dataclass(frozen=True)
class Operator:
    function: Callable
    reference: Callable
    inputs: str  # letters: x and r have the image's shape, v and p [C], w and b are a convolution's
    options: dict[str, Any]

    def takes(self, shape: tuple[int, ...]) -> bool:
        images_only = "w" in self.inputs or self.inputs == "xx"
        return (len(shape) == 4 or not images_only) and (0 not in shape[2:] or self.function is row_norm_act)

    def tensors(self, dtype, device, shape=(2, 6, 3, 4), channels_last=True, parameters=None) -> list[Tensor]:
        """Leaves that want gradients."""
        shapes = {
            "x": shape,
            "r": shape,
            "v": shape[1:2],
            "p": shape[1:2],
            "w": (4, shape[1], 3, 3),
            "b": (4,),
        }
        made = []
        for kind in self.inputs:
            t = torch.randn(shapes[kind], dtype=torch.float64).to(
                device, dtype if kind in "xr" else parameters or dtype
            )
            t = t.abs() + 0.5 if self.inputs == "xx" else t  # features after a ReLU, none of them empty
            t = t.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last and t.ndim > 1 else t
            made.append(t.requires_grad_())
        return made

    def run(self, *inputs: Tensor, backend: Any = "triton", **options: Any) -> tuple[Tensor, ...]:
        return self._call(self.function, inputs, {**options, "backend": backend})

    def expected(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return self._call(self.reference, inputs, options)

    def _call(
        self, function: Callable, inputs: tuple[Tensor, ...], options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        named = list(zip(self.inputs, inputs, strict=True))
        keywords = {KEYWORDS[kind]: t for kind, t in named if kind in KEYWORDS}
        return as_tuple(
            function(
                *(t for kind, t in named if kind not in KEYWORDS), **keywords, **{**self.options, **options}
            )
        )


def fused_conv(x, weight, bias, groups, **options):
    return norm_act_conv2d(x, Norm(weight, bias, groups), **options)


def plain_conv(x, weight, bias, groups, conv_weight, conv_bias, padding, pre_bias=None, residual=None):
    y, *total = as_tuple(norm_act_reference(x, weight, bias, groups, pre_bias=pre_bias, residual=residual))
    return F.conv2d(y, conv_weight, conv_bias, padding=padding), *total


def distance(function: Callable) -> Callable:
    """With a weight in fp32 or fp64 that wants no gradient: the kernels have none for it."""

    def call(a: Tensor, b: Tensor, **options: Any) -> Tensor:
        weight = torch.linspace(0.1, 1, a.shape[1], device=a.device).to(
            torch.promote_types(a.dtype, torch.float32)
        )
        return function(a, b, weight, **options)

    return call


NORM_ACT, ROW = (norm_act, norm_act_reference), (row_norm_act, row_norm_act_reference)
OPERATORS = {
    "norm_act": Operator(*NORM_ACT, "xvv", {"groups": 3}),
    "norm_act identity pre_bias": Operator(*NORM_ACT, "xvvp", {"groups": 3, "act": "identity"}),
    "norm_act pre_bias": Operator(*NORM_ACT, "xvvp", {"groups": 3}),
    "norm_act residual": Operator(*NORM_ACT, "xvvr", {"groups": 3}),
    "norm_act identity pre_bias residual": Operator(*NORM_ACT, "xvvpr", {"groups": 3, "act": "identity"}),
    "norm_act pre_bias residual": Operator(*NORM_ACT, "xvvpr", {"groups": 3}),
    "row_norm_act rms": Operator(*ROW, "xvv", {"norm": "rms"}),
    "row_norm_act rms identity": Operator(*ROW, "xv", {"norm": "rms", "act": "identity"}),
    "row_norm_act layer": Operator(*ROW, "xvv", {"norm": "layer"}),
    "row_norm_act layer identity": Operator(*ROW, "xvv", {"norm": "layer", "act": "identity"}),
    "lpips_head": Operator(distance(lpips_head), distance(lpips_head_reference), "xx", {"eps": 1e-2}),
    "norm_act_conv2d": Operator(fused_conv, plain_conv, "xvvwb", {"groups": 3, "padding": 1}),
    "norm_act_conv2d pre_bias residual": Operator(
        fused_conv, plain_conv, "xvvwbpr", {"groups": 3, "padding": 1}
    ),
}
MAIN = ["norm_act pre_bias residual", "row_norm_act rms", "row_norm_act layer", "lpips_head"]
WHOLE = ["norm_act", *MAIN, "norm_act_conv2d", "norm_act_conv2d pre_bias residual"]
BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


def with_gradients(function: Callable, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Outputs, and the gradients of all inputs."""
    outputs = function(*inputs, **options)
    values = [
        (1 + torch.arange(y.numel(), device=y.device)).sin().bfloat16() for y in outputs
    ]  # the same in every dtype
    tangents = [value.view(y.shape).to(y.dtype) for value, y in zip(values, outputs, strict=True)]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, inputs, tangents)]


def wide(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in inputs]


SHAPES = [
    ((2, 21, 5, 7), True),
    ((2, 6, 9, 11), False),
    ((1, 6, 1, 1), True),
    ((0, 6, 4, 4), True),
    ((2, 6, 3, 4, 5), True),
    ((2, 6, 3, 4, 5), False),
    ((2, 6, 9), False),
    ((5, 6), False),
    ((2, 6, 0, 3), True),
]


@BACKENDS
@pytest.mark.parametrize(
    ("name", "shape", "channels_last"),
    [(name, *case) for name, operator in OPERATORS.items() for case in SHAPES if operator.takes(case[0])],
)
def test_equals_the_reference_in_fp64_with_gradients(backend, name, shape, channels_last, device):
    operator = OPERATORS[name]
    inputs = operator.tensors(torch.float64, device, shape, channels_last)
    expected = with_gradients(operator.expected, inputs)
    for ours, theirs in zip(with_gradients(operator.run, inputs, backend=backend), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    if len(shape) == 4 and 0 not in shape and operator.takes(shape[:2]):
        y = operator.run(*inputs, backend=backend)[0]
        assert y.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


# (groups, shape, channels_last): widths of shipped models, ragged tiles, odd sides, one sample, 2-D
# to 5-D
CASES = [
    (32, (2, 32, 5, 7), True),
    (32, (1, 96, 3, 5), True),
    (32, (1, 128, 7, 3), False),
    (32, (1, 320, 3, 3), True),
    (32, (1, 512, 5, 1), False),
    (4, (2, 20, 5, 11), True),
    (1, (2, 3, 9, 7), True),
    (1, (1, 1, 13, 11), True),
    (1, (1, 64, 33, 31), True),
    (2, (2, 8, 3, 5, 2), True),
    (8, (3, 24, 13), False),
    (4, (5, 16), False),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "groups", "shape", "channels_last"),
    [
        (name, *case)
        for name in ("norm_act pre_bias", *MAIN[1:])
        for case in CASES
        if OPERATORS[name].takes(case[1])
    ],
)
def test_kernels_are_as_exact_as_rounding_allows(name, groups, shape, channels_last, dtype, device):
    """Half precision has one rounding and is never worse than eager; fp32 loses no more than sums
    of its size do.
    """
    operator = OPERATORS[name]
    options = {"groups": groups} if "groups" in operator.options else {}
    inputs = operator.tensors(dtype, device, shape, channels_last, parameters=torch.float32)
    exact = with_gradients(operator.expected, wide(inputs), **options)
    fused, eager = (
        with_gradients(operator.run, inputs, backend=backend, **options) for backend in ("triton", "torch")
    )
    for ours, theirs, truth in zip(fused, eager, exact, strict=True):
        error, eager_error, ideal = (
            (t.double() - truth).norm().item() for t in (ours, theirs, truth.to(dtype))
        )
        norm = truth.norm().item()
        if (
            ours.ndim != len(shape) or ours.shape[0] != shape[0]
        ):  # sums over all pixels in fp32, and some of them are zero
            pixels = inputs[0].numel() / inputs[0].shape[1]
            assert (ours.double() - truth).abs().max() <= 5e-6 * pixels**0.5 * truth.abs().max().clamp(min=1)
        elif dtype != torch.float32:  # the floor: what is left of a difference of equal numbers in fp32
            assert error <= min(1.05 * ideal, 1.02 * eager_error) + 2e-6 * norm + 1e-6
        else:  # with a large 1 / std the gradient is a difference of large numbers, for eager too
            assert error <= max(2e-6 * norm, 1e-6, 2 * eager_error)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(["norm_act identity pre_bias", *MAIN]),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 23), st.integers(1, 9), st.integers(1, 9)),
    groups=st.integers(1, 4),
    channels_last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_shape(name, shape, groups, channels_last, dtype):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    operator = OPERATORS[name]
    dtype = (
        torch.float32 if "r" in operator.inputs else dtype
    )  # a sum that is stored in half precision is rounded twice
    options = {"eps": 1e-2} | ({"groups": groups} if "groups" in operator.options else {})
    shape = (shape[0], shape[1] * groups, *shape[2:])
    inputs = operator.tensors(dtype, device, shape, channels_last, parameters=torch.float32)
    exact = with_gradients(operator.expected, wide(inputs), **options)
    for ours, truth in zip(with_gradients(operator.run, inputs, **options), exact, strict=True):
        largest = max(truth.abs().max().item(), 1e-2 if name == "lpips_head" else 1) if truth.numel() else 1
        torch.testing.assert_close(
            ours.double(), truth, rtol=0, atol=(3 * torch.finfo(ours.dtype).eps + 2e-5) * largest
        )


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("norm_act pre_bias residual", (1, 12, 33, 35)),
        ("row_norm_act layer", (1, 48, 19, 17)),
        ("lpips_head", (1, 48, 13, 11)),
    ],
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_two_runs_are_equal_to_the_bit(name, shape, channels_last, device):
    inputs = OPERATORS[name].tensors(torch.float32, device, shape, channels_last)
    first, second = (with_gradients(OPERATORS[name].run, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [*WHOLE[1:], "norm_act identity pre_bias"])
def test_first_and_second_derivatives_are_those_of_the_function(name, device):
    operator = OPERATORS[name]
    inputs = operator.tensors(torch.float64, device, (2, 3, 1, 2))
    assert torch.autograd.gradcheck(operator.run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(operator.run, inputs, fast_mode=True)
    if operator.inputs == "xx":
        assert torch.autograd.gradgradcheck(
            lambda a: operator.run(a, inputs[1].detach()), inputs[:1], fast_mode=True
        )


@pytest.mark.parametrize("name", WHOLE)
def test_second_derivatives_where_the_gradient_depends_on_the_input_too(name, device):
    """As in every real network: the gradient that comes in is a function of the input."""
    operator = OPERATORS[name]
    inputs = operator.tensors(torch.float64, device)
    results = []
    for function in (operator.run, operator.expected):
        (gradient,) = torch.autograd.grad(function(*inputs)[0].sin().sum(), inputs[0], create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), inputs, allow_unused=True))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


@BACKENDS
@pytest.mark.parametrize("name", WHOLE)
def test_compiles_into_one_graph(name, backend, device):
    torch.compiler.reset()  # each operator would be one more recompilation of the same function
    operator = OPERATORS[name]
    inputs = operator.tensors(torch.float64, device)
    compiled = torch.compile(
        lambda *inputs: operator.run(*inputs, backend=backend), fullgraph=True, backend="aot_eager"
    )
    for ours, expected in zip(
        with_gradients(compiled, inputs), with_gradients(operator.expected, inputs), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


class Layer(torch.nn.Module):
    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.operator.run(*inputs, backend="auto")


@pytest.mark.parametrize("name", WHOLE)
def test_an_exported_model_shows_standard_operators(name, device):
    inputs = tuple(t.detach() for t in OPERATORS[name].tensors(torch.float32, device))
    with use_backend("triton"):
        program = torch.export.export(Layer(OPERATORS[name]), inputs)
    calls = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert calls
    assert not {call for call in calls if "latentae" in call}
    if name == "norm_act":
        assert calls == {"aten.group_norm.default", "aten.silu.default"}


@BACKENDS
@pytest.mark.parametrize("name", MAIN)
def test_autocast_keeps_half_precision_with_single_precision_parameters(name, backend, device):
    operator = OPERATORS[name]
    inputs = operator.tensors(torch.bfloat16, device, (2, 6, 5, 5), parameters=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        found = with_gradients(operator.run, inputs, backend=backend)
    exact = operator.expected(*wide(inputs))
    half = operator.inputs != "xx"  # a distance is in single precision
    for ours, truth in zip(found, exact, strict=False):
        assert ours.dtype == (torch.bfloat16 if half else torch.float32)
        assert (ours.double() - truth).abs().max() <= (0.02 if half else 1e-5) * truth.abs().max()
    assert [gradient.dtype for gradient in found[len(exact) :]] == [t.dtype for t in inputs]


@pytest.mark.parametrize("name", ["row_norm_act rms", "lpips_head"])
def test_more_channels_than_the_kernels_take(name, device):
    operator = OPERATORS[name]
    inputs = operator.tensors(torch.float32, device, (1, 4097, 1, 2))
    with pytest.raises(BackendError, match="4097 channels, the kernels take at most 4096"):
        operator.run(*inputs)
    with use_backend("triton"):
        torch.testing.assert_close(operator.run(*inputs, backend="auto"), operator.expected(*inputs))
    fewer = operator.tensors(torch.float32, device, (1, 4096, 1, 2))
    torch.testing.assert_close(operator.run(*fewer), operator.expected(*fewer))
