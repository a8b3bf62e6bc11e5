from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from latentae_kernels import upsample_conv2d

METHODS = ["auto", "plain", "folded", "differences"]
FORMATS = [torch.channels_last, torch.contiguous_format]


def plain(x, weight, bias=None):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def tensors(batch, channels, out_channels, height, width, layout=torch.channels_last, dtype=torch.float64):
    x = torch.randn(batch, channels, height, width, dtype=dtype).to(memory_format=layout)
    weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype).to(memory_format=layout)
    return x, weight, torch.randn(out_channels, dtype=dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5, 5), (1, 1, 1, 1, 1), (1, 3, 64, 7, 1), (2, 20, 3, 1, 6), (3, 64, 20, 5, 9)]
)
def test_equals_the_plain_operators_and_keeps_the_memory_format(method, layout, shape):
    x, weight, bias = tensors(*shape, layout)
    with torch.no_grad():
        for shift in (bias, None):
            expected = plain(x, weight, shift)
            found = upsample_conv2d(x, weight, shift, method)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            assert found.is_contiguous(memory_format=layout) or not x.numel()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12))
def test_any_shape(batch, channels, out_channels, height, width):
    x, weight, bias = tensors(batch, channels, out_channels, height, width)
    with torch.no_grad():
        found = upsample_conv2d(x, weight, bias, "differences")
        torch.testing.assert_close(found, plain(x, weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 64, 2, 300, 64), (2, 64, 2, 3, 8200)])
def test_an_image_of_several_strips_has_no_seam(shape):
    """Strips of 128, 128 and 44 lines, and of one line that is longer than a strip."""
    x, weight, bias = tensors(*shape)
    with torch.no_grad():
        torch.testing.assert_close(
            upsample_conv2d(x, weight, bias, "differences"), plain(x, weight, bias), rtol=1e-11, atol=1e-11
        )


@pytest.mark.parametrize("method", ["auto", "folded"])
@pytest.mark.parametrize("layout", FORMATS)
def test_gradients_are_those_of_the_plain_operators(method, layout):
    results = []
    inputs = [
        t.requires_grad_() for t in tensors(2, 32, 32, 24, 23, layout)
    ]  # large enough for "auto" to fold
    for function in (plain, lambda *t: upsample_conv2d(*t, method)):
        out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_second_derivatives_are_right():
    inputs = [t.requires_grad_() for t in tensors(1, 2, 2, 2, 3)]
    assert torch.autograd.gradcheck(lambda *t: upsample_conv2d(*t, "folded"), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: upsample_conv2d(*t, "folded"), inputs)


@pytest.mark.parametrize("method", ["folded", "differences"])
@pytest.mark.parametrize("channels", [64, 256])
def test_fp32_is_as_near_fp64_as_the_plain_operators(method, channels):
    exact = tensors(1, channels, channels, 16, 16)
    x, weight, bias = (t.float() for t in exact)
    expected = plain(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        error = (upsample_conv2d(x, weight, bias, method) - expected).square().mean()
        assert error <= 1.5 * (plain(x, weight, bias) - expected).square().mean()


def test_half_precision_keeps_the_plain_operators_accuracy():
    x, weight, bias = (t.bfloat16() for t in tensors(1, 64, 64, 32, 32))
    expected = plain(x.double(), weight.double(), bias.double())
    with torch.no_grad():
        assert torch.equal(upsample_conv2d(x, weight, bias), plain(x, weight, bias))
        error = {
            m: (upsample_conv2d(x, weight, bias, m) - expected).square().mean().sqrt()
            for m in ("plain", "folded")
        }
    assert error["folded"] <= 3 * error["plain"]  # the sums of weights are rounded: nothing for "auto"


def test_weights_changed_in_place_count_at_once():
    x, weight, bias = tensors(1, 4, 4, 6, 6)
    with torch.no_grad():
        upsample_conv2d(x, weight, bias, "differences")
        weight.mul_(2)
        torch.testing.assert_close(upsample_conv2d(x, weight, bias, "differences"), plain(x, weight, bias))


class Layer(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return upsample_conv2d(x, self.conv.weight, self.conv.bias)


def test_an_export_shows_standard_operators_and_a_compiled_model_is_one_graph():
    layer, x = Layer(128).eval(), torch.randn(1, 128, 24, 24).to(memory_format=torch.channels_last)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names == {"aten.upsample_nearest2d.vec", "aten.conv2d.default"}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(
                compiled(x), plain(x, layer.conv.weight, layer.conv.bias), rtol=1e-4, atol=1e-4
            )


def test_works_under_autocast_and_vmap():
    x, weight, bias = (t.float() for t in tensors(1, 128, 128, 24, 24))
    with torch.no_grad():
        expected = plain(x, weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert upsample_conv2d(x, weight, bias).dtype == torch.bfloat16
        both = torch.func.vmap(lambda t: upsample_conv2d(t, weight, bias))(torch.stack([x, 2 * x]))
        torch.testing.assert_close(both[0], expected, rtol=1e-4, atol=1e-3)
    with torch.inference_mode():
        torch.testing.assert_close(upsample_conv2d(x, weight, bias), expected, rtol=1e-4, atol=1e-3)
    with torch.no_grad():  # memory kept from the inference mode serves here too
        torch.testing.assert_close(upsample_conv2d(x, weight, bias), expected, rtol=1e-4, atol=1e-3)


def test_what_can_not_run_says_so():
    x, weight, bias = tensors(1, 4, 6, 3, 3)
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        upsample_conv2d(x, weight, bias, "fast")  # pyright: ignore
    with pytest.raises(ValueError, match=r"weight has shape \(6, 4, 3, 1\)"):
        upsample_conv2d(x, weight[..., :1], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\), expected \(6,\)"):
        upsample_conv2d(x, weight, bias[:5])
    with pytest.raises(ValueError, match=r"x has shape \(4, 3, 3\)"):
        upsample_conv2d(x[0], weight, bias)
    with pytest.raises(ValueError, match=r"x has dtype torch.int64"):
        upsample_conv2d(x.long(), weight, bias)
    with pytest.raises(ValueError, match="method='differences' is for fp32 or fp64"):
        upsample_conv2d(x.requires_grad_(), weight, bias, "differences")
