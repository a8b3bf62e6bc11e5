from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_formulas import norm_act_reference
from latentae_kernels import Norm, conv3x3, winograd
from latentae_kernels.winograd import Strips, convolve_strips

FORMATS = [torch.channels_last, torch.contiguous_format]


def tensors(batch, channels, out_channels, height, width, layout=torch.channels_last, dtype=torch.float64):
    x = torch.randn(batch, channels, height, width, dtype=dtype).to(memory_format=layout)
    weight = torch.randn(out_channels, channels, 3, 3, dtype=dtype).to(memory_format=layout)
    return x, weight, torch.randn(out_channels, dtype=dtype), *torch.randn(2, channels, dtype=dtype)


def plain(x, weight, bias=None, norm=None):
    if norm is not None:
        x = norm_act_reference(x, norm.weight, norm.bias, norm.groups, norm.eps, "identity")
        x = F.silu(x) if norm.act == "silu" else x
    return F.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize(
    "shape",
    [
        (0, 3, 4, 5, 5),
        (1, 1, 1, 1, 1),
        (1, 3, 64, 7, 1),
        (2, 20, 3, 1, 6),
        (5, 64, 20, 5, 9),
        (2, 8, 8, 9, 6),
    ],
)
def test_equals_the_native_convolution_and_keeps_the_memory_format(layout, shape):
    x, weight, bias, gamma, beta = tensors(*shape, layout)
    norm = Norm(gamma, beta, 1, 1e-5, "silu" if layout == torch.channels_last else "identity")
    with torch.no_grad():
        for shift, before in ((bias, None), (None, norm if x[0:1].numel() > 1 else None)):
            expected = plain(x, weight, shift, before)
            kept = x.clone()
            for overwrite in (False, True):
                assert torch.equal(x, kept)
                found = conv3x3(x, weight, shift, before, overwrite, "winograd")
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
                assert found.is_contiguous(memory_format=layout) or not x.numel()


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape_in_strips_of_any_size(data):
    batch, height, width = (data.draw(st.integers(low, high)) for low, high in ((1, 4), (1, 19), (1, 19)))
    channels, transformed, overwrite = (
        data.draw(st.integers(1, 12)),
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    out_channels = channels if overwrite else data.draw(st.integers(1, 9))
    rows = data.draw(st.integers(1, -(-height // 4)))
    samples = data.draw(st.integers(1, batch)) if 4 * rows >= height else 1
    strips = Strips(rows, samples, data.draw(st.integers(1, 9)))
    layout, silu = data.draw(st.sampled_from(FORMATS)), transformed and data.draw(st.booleans())
    x, weight, bias, *_ = tensors(batch, channels, out_channels, height, width, layout)
    affine = tuple(torch.randn(3, batch, channels, dtype=x.dtype)) if transformed else None
    mean, scale, shift = (t[:, :, None, None] for t in affine or torch.zeros(3, batch, channels))
    before = x if affine is None else scale * (x - mean) + shift
    expected = F.conv2d(F.silu(before) if silu else before, weight, bias, padding=1)
    found = x if overwrite and transformed else torch.empty_like(expected)
    with torch.no_grad():
        convolve_strips(x, weight, bias, affine, silu, strips, found)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [128, 512])
def test_fp32_error_stays_within_twice_that_of_the_native_convolution(channels):
    x, weight, bias, *_ = tensors(1, channels, 128, 24, 24)
    exact = F.conv2d(F.silu(x.float()).double(), weight.float().double(), bias.float().double(), padding=1)
    x, weight, bias = F.silu(x.float()), weight.float(), bias.float()
    with torch.no_grad():
        native, ours = (conv3x3(x, weight, bias, method=m) - exact for m in ("native", "winograd"))
    assert 0 < ours.square().mean() <= 4 * native.square().mean()


def taken(monkeypatch):
    """A list that grows whenever Winograd's method runs."""
    calls, real = [], winograd.convolve_strips
    monkeypatch.setattr(winograd, "convolve_strips", lambda *args: (calls.append(args[0].shape), real(*args)))
    monkeypatch.setattr(winograd, "_capability", lambda: "AVX2")
    return calls


def large(batch=1, layout=torch.channels_last):
    return [t.float() for t in tensors(batch, 160, 192, 48, 46, layout)]


def test_auto_takes_it_for_large_inference_only(monkeypatch):
    calls = taken(monkeypatch)
    x, weight, bias, gamma, beta = large()
    with torch.no_grad():
        conv3x3(x, weight, bias, Norm(gamma, beta, 32))
        assert len(calls) == 1
        conv3x3(x[:, :, :8, :8], weight)  # small
        conv3x3(x.contiguous(), weight)  # channels first
        conv3x3(x.double(), weight.double())
        conv3x3(x, weight[:64])  # few channels
        conv3x3(x, weight, method="native")
        with torch.autocast("cpu", torch.bfloat16):
            assert conv3x3(x, weight).dtype == torch.bfloat16
        torch.func.vmap(lambda t: conv3x3(t, weight))(torch.stack([x, x]))
        monkeypatch.setattr(winograd, "_capability", lambda: "AVX512")
        conv3x3(x, weight)
    assert len(calls) == 1


def test_gradients_are_those_of_native_operators(monkeypatch):
    calls = taken(monkeypatch)
    inputs = [t.requires_grad_() for t in large()]
    x, weight, bias, gamma, beta = inputs
    results = [f(x, weight, bias, Norm(gamma, beta, 32)) for f in (conv3x3, plain)]
    found, expected = (torch.autograd.grad(out.square().mean(), inputs) for out in results)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not calls


def test_weights_changed_in_place_count_at_once():
    x, weight, *_ = large()
    with torch.inference_mode():
        conv3x3(x, weight, method="winograd")
        weight.mul_(2)
        found = conv3x3(x, weight, method="winograd")
        torch.testing.assert_close(found, plain(x, weight), rtol=1e-4, atol=1e-3)
    with torch.no_grad():  # memory kept from the inference mode serves here too
        assert torch.equal(conv3x3(x, weight, method="winograd"), found)


def test_threads_do_not_share_intermediate_results():
    cases = [large(), large()]
    with torch.no_grad():
        expected = [conv3x3(x, weight, bias, method="winograd") for x, weight, bias, *_ in cases]
    found: dict[int, torch.Tensor] = {}

    def work(index):
        x, weight, bias, *_ = cases[index]
        with torch.no_grad():
            for _ in range(5):
                found[index] = conv3x3(x, weight, bias, method="winograd")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in enumerate(expected):
        torch.testing.assert_close(found[index], values, rtol=1e-6, atol=1e-5)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = torch.nn.GroupNorm(32, 160), torch.nn.Conv2d(160, 192, 3, padding=1)

    def forward(self, x):
        return conv3x3(
            x, self.conv.weight, self.conv.bias, Norm(self.norm.weight, self.norm.bias, 32, self.norm.eps)
        )


def test_an_export_shows_standard_operators_and_a_compiled_model_is_one_graph():
    layer, x = Layer().eval(), large()[0]
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert names == {"aten.group_norm.default", "aten.silu.default", "aten.conv2d.default"}
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


def test_what_can_not_run_says_so():
    x, weight, bias, gamma, beta = tensors(1, 4, 6, 3, 3)
    with pytest.raises(ValueError, match="unknown method 'fft'"):
        conv3x3(x, weight, bias, method="fft")  # pyright: ignore
    with pytest.raises(ValueError, match=r"weight has shape \(6, 3, 3, 3\), expected \[C_out, 4, 3, 3\]"):
        conv3x3(x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"bias has shape \(5,\), expected \(6,\)"):
        conv3x3(x, weight, bias[:5])
    with pytest.raises(ValueError, match="groups is 3"):
        conv3x3(x, weight, bias, Norm(gamma, beta, 3))
    with pytest.raises(ValueError, match="without gradients"):
        conv3x3(x.requires_grad_(), weight, bias, method="winograd")
    with torch.no_grad(), pytest.raises(ValueError, match=r"x is torch.bfloat16"):
        conv3x3(x.bfloat16(), weight.bfloat16(), method="winograd")
