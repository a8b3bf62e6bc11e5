"""torch.compile takes encode and decode as one graph each, in a pipeline and in training."""

from __future__ import annotations

import pytest
import torch
from small_models import dc_config, two_levels

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.dc.autoencoder import AutoencoderDC

pytestmark = pytest.mark.slow  # tests/models/test_pending.py compiles one model in the fast set

# every block: attention in a level and the middle, a new width, both resamplings, 1x1 convolutions
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "norm_num_groups": 4,
    "block_out_channels": (8, 16),
}
BLOCKS |= {"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
SETTINGS = {
    "inference": (BLOCKS, False, torch.float32),
    "training": (BLOCKS, True, torch.float32),
    "plain blocks": (PLAIN, False, torch.float32),
    "bf16 weights": (BLOCKS, False, torch.bfloat16),
    "autocast": (BLOCKS, False, "autocast"),
    "AutoencoderDC": (None, False, torch.float32),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(blocks: dict | None) -> AutoencoderKL | AutoencoderDC:
    return AutoencoderDC(dc_config()) if blocks is None else AutoencoderKL(two_levels(**blocks))


def moments(model: AutoencoderKL | AutoencoderDC, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    posterior = model.encode(x)
    return posterior.mean, posterior.logvar


@pytest.mark.parametrize("setting", SETTINGS)
def test_compiled_as_one_graph_encode_and_decode_give_the_same(setting):
    blocks, training, precision = SETTINGS[setting]
    dtype = precision if isinstance(precision, torch.dtype) else torch.float32
    model = build(blocks).train(training).to(dtype)
    f, z = model.config.downsampling, model.config.latent_channels
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if precision is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    with (
        torch.set_grad_enabled(training),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
    ):
        for call, given in (
            (lambda x: moments(model, x), torch.randn(2, 3, 4 * f, 6 * f, dtype=dtype)),
            (model.decode, torch.randn(2, z, 4, 6, dtype=dtype)),
        ):
            compiled = torch.compile(
                call, fullgraph=True, backend="aot_eager"
            )  # fullgraph: a graph break is an error
            torch.testing.assert_close(compiled(given), call(given), **tolerance)


@torch.no_grad()
def test_one_graph_serves_many_sizes():
    """With dynamic=True neither another batch nor another size compiles again."""
    model, graphs = build(BLOCKS).eval(), []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    call = torch.compile(lambda x: moments(model, x), fullgraph=True, dynamic=True, backend=count)
    for shape in ((2, 3, 16, 24), (3, 3, 32, 16), (5, 3, 40, 48)):
        x = torch.randn(shape)
        torch.testing.assert_close(call(x), moments(model, x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
