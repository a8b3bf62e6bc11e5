"""torch.compile takes encode and decode as one graph each: what a pipeline compiles, and what training does."""

from __future__ import annotations

import pytest
import torch

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig

# Small, since tracing takes its time, yet with every kind of block: attention in a level and in the middle, a change of width,
# both resamplings, both 1x1 convolutions.
CONFIG = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    norm_num_groups=4,
)
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**overrides) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(**{**CONFIG.model_dump(), **overrides}))


def moments(model: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    posterior = model.encode(x)
    return posterior.mean, posterior.logvar


def passes(model: AutoencoderKL):
    """What is compiled, and its input: encode to mean and logvar, and decode. tests/models/test_pending.py has gradients."""
    f, z = model.config.downsampling, model.config.latent_channels
    x, latents = torch.randn(2, 3, 4 * f, 6 * f), torch.randn(2, z, 4, 6)
    return {
        "encode": (lambda x: moments(model, x), (x,)),
        "decode": (model.decode, (latents,)),
    }


@pytest.mark.parametrize(("overrides", "training"), [({}, False), ({}, True), (PLAIN, False)], ids=["all", "training", "plain"])
def test_no_graph_breaks(overrides, training):
    model = build(**overrides).train(training)
    with torch.set_grad_enabled(training):
        for what in ("encode", "decode"):
            call, arguments = passes(model)[what]
            report = torch._dynamo.explain(call)(*arguments)
            assert report.graph_break_count == 0, (what, report.break_reasons)
            assert report.graph_count == 1, what


@torch.no_grad()
def test_the_report_would_show_a_break(monkeypatch):
    """The test above can fail."""
    model = build()
    plain = model.decoder.mid_block.forward
    monkeypatch.setattr(model.decoder.mid_block, "forward", lambda *args: (torch._dynamo.graph_break(), plain(*args))[1])
    call, arguments = passes(model)["decode"]
    assert torch._dynamo.explain(call)(*arguments).graph_break_count > 0


@torch.no_grad()
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_compiled_as_one_graph_it_gives_the_same(what):
    model = build().eval()
    call, arguments = passes(model)[what]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_half_precision_breaks_nothing(how):
    model = build().to(torch.bfloat16 if how == "weights" else torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        for what in ("encode", "decode"):
            call, [argument] = passes(model)[what]
            report = torch._dynamo.explain(call)(argument.to(model.encoder.conv_in.weight.dtype))
            assert report.graph_break_count == 0, (what, report.break_reasons)


@torch.no_grad()
def test_one_graph_serves_many_sizes():
    """With dynamic=True neither another batch nor another size compiles again."""
    model, graphs = build().eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(lambda x: moments(model, x), fullgraph=True, dynamic=True, backend=count)
    for shape in ((2, 3, 16, 24), (3, 3, 32, 16), (5, 3, 40, 48)):
        x = torch.randn(shape)
        torch.testing.assert_close(call(x), moments(model, x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
