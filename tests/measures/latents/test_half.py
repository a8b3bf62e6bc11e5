from __future__ import annotations

import copy
import json
import math
import warnings

import pytest
import torch
from known import blocks
from torch.utils._python_dispatch import TorchDispatchMode

from latentae import AutoencoderKL, AutoencoderKLConfig
from latentae.errors import DataError, ImageError, ModelError
from latentae.measures.latents import half
from latentae.measures.latents.half import FP16_MAX, MARGIN, HalfAudit, HalfRun, audit_half
from latentae.models.config import AutoencoderDCConfig, LinearAutoencoderConfig
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.linear import LinearAutoencoder

BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
CONFIG = AutoencoderKLConfig(**BLOCKS, block_out_channels=(8, 16), norm_num_groups=4)
ENCODER_STAGES = ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "conv_out", "quant_conv"]
DECODER_STAGES = ["post_quant_conv", "conv_in", "mid_block", "up_blocks.0", "up_blocks.1", "conv_out"]


def make() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(CONFIG).eval()


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(*shape, generator=generator) * 2 - 1 for shape in ((2, 3, 16, 24), (1, 3, 8, 10))]


class Largest(TorchDispatchMode):
    """The largest magnitude that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        values = [out[0]] if func is torch.ops.aten.native_group_norm.default else [out]  # not its statistics
        values = [
            v
            for v in values
            if isinstance(v, torch.Tensor) and v.is_floating_point() and "t." not in str(func)
        ]
        self.value = max([self.value, *(v.abs().max().item() for v in values)])
        return out


@pytest.fixture(scope="module")
def healthy() -> tuple[AutoencoderKL, HalfAudit]:
    model = make()
    with torch.no_grad():
        model.encoder.down_blocks[0].resnets[0].conv2.weight.mul_(40)
    return model, audit_half(model, images())


def test_a_healthy_model_is_safe_and_its_maxima_are_those_of_diffusers(healthy):
    """The largest activation is the one that a dispatch mode sees inside diffusers' model."""
    model, found = healthy
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own imports warn
        kind = pytest.importorskip("diffusers").AutoencoderKL
        theirs = kind(**{k: v for k, v in CONFIG.diffusers_dict().items() if not k.startswith("_")}).eval()
    theirs.load_state_dict(model.state_dict())
    assert list(found.encoder) == ENCODER_STAGES
    assert list(found.decoder) == DECODER_STAGES
    with torch.no_grad(), Largest() as largest:
        for batch in images():
            theirs.encode(batch)
    assert max(found.encoder.values()) == pytest.approx(largest.value, rel=1e-5)
    assert found.largest == ("encoder", "down_blocks.0", pytest.approx(largest.value, rel=1e-5))

    assert found.obstacle is None
    assert not found.force_upcast
    assert found.images == 3
    assert found.runs["fp16"].finite
    assert found.runs["fp16"].image_psnr > found.runs["bf16"].image_psnr + 10  # three more bits


def test_half_precision_differences_are_those_of_the_model_run_in_it(healthy):
    model, found = healthy
    low, run, latent_errors, image_errors = copy.deepcopy(model).half(), found.runs["fp16"], [], []
    with torch.no_grad():
        for seed, batch in zip((0, 2), images(), strict=True):  # the seed is the number of images before
            posterior = model.encode(batch)
            latent_errors.append((low.encode(batch.half()).mean - posterior.mean).abs().max().item())
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(seed))
            latent = posterior.sample(noise=noise)
            image_errors.append((low.decode(latent.half()).float() - model.decode(latent)).flatten())
    image_error = torch.cat(image_errors)
    assert run.latent_max_abs == pytest.approx(max(latent_errors), rel=1e-2)
    assert run.image_max_abs == pytest.approx(image_error.abs().max().item(), rel=1e-2)
    assert run.image_psnr == pytest.approx(10 * math.log10(4 / image_error.square().mean().item()), abs=0.1)


def test_json_and_rows_say_what_was_measured(healthy):
    _, found = healthy
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (values["images"], values["half_images"], values["force_upcast"]) == (3, 3, False)
    assert values["activation_maxima"]["encoder"] == dict(found.encoder)
    assert values["runs"]["fp16"]["image_psnr"] == found.runs["fp16"].image_psnr
    rows = dict(found.rows())
    assert rows["fp16"] == "safe"
    assert f"{max(found.decoder.values()):.4g}" in rows["Largest activation, decoder"]
    assert f"{found.runs['bf16'].image_psnr:.1f} dB" in rows["bf16 against fp32"]


def test_an_overflow_inside_a_block_is_found_and_its_stage_named():
    """The block's own output is harmless: its second normalization takes the size away again."""
    model, seen = make(), []
    block = model.decoder.up_blocks[1].resnets[0]
    with torch.no_grad():
        block.conv1.weight.mul_(1e6)
    block.register_forward_hook(lambda _, __, out: seen.append(out.abs().max().item()))
    with torch.no_grad():
        model.decode(torch.randn(1, CONFIG.latent_channels, 4, 4))
    assert max(seen) < 1000

    found = audit_half(model, images())
    assert found.force_upcast
    assert found.largest[:2] == ("decoder", "up_blocks.1")
    assert found.largest[2] > FP16_MAX
    assert "in up_blocks.1 of the decoder; fp16 ends at 65504" in found.obstacle
    assert not found.runs["fp16"].finite
    assert found.runs["fp16"].image_psnr is None
    assert found.runs["fp16"].latent_max_abs < 0.1  # the encoder is as healthy as before
    assert found.runs["bf16"].finite
    assert ("fp16", f"not safe: {found.obstacle}") in found.rows()
    assert ("fp16 against fp32", "not finite") in found.rows()


def test_attention_logits_count():
    model = make()
    attention = model.encoder.mid_block.attentions[0]
    with torch.no_grad():
        attention.to_q.weight.mul_(2000)
        attention.to_k.weight.mul_(2000)
    parts = []
    for layer in (attention.to_q, attention.to_k):
        layer.register_forward_hook(lambda _, __, out: parts.append(out))
    with torch.no_grad():
        model.encode(images()[0])
    query, key = parts
    logits = (query @ key.transpose(1, 2) / math.sqrt(16)).abs().max().item()
    assert max(query.abs().max(), key.abs().max()) < FP16_MAX / MARGIN < logits

    found = audit_half(model, images()[:1])
    assert found.encoder["mid_block"] == pytest.approx(logits, rel=1e-4)
    assert found.force_upcast


def test_weights_that_are_not_finite_show():
    model = blocks(2).train()
    model.gain.data.fill_(torch.nan)
    found = audit_half(model, [torch.zeros(1, 3, 4, 4)])
    assert model.training  # a copy was audited
    assert found.force_upcast
    assert found.decoder["decoder"] == math.inf
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert values["force_upcast"] is True
    assert values["activation_maxima"]["decoder"]["decoder"] is None


def test_the_verdict_asks_for_a_margin_and_for_small_differences():
    runs = {"fp16": HalfRun(True, 1e-3, 1e-3, 60.0), "bf16": HalfRun(True, 1e-2, 1e-2, 40.0)}

    def verdict(largest: float, fp16: HalfRun = runs["fp16"]) -> str | None:
        return HalfAudit(8, 8, {"conv_in": 1.0}, {"up_blocks.0": largest}, {**runs, "fp16": fp16}).obstacle

    assert verdict(FP16_MAX / 4) is None
    assert "activations reach 1.639e+04 in up_blocks.0" in verdict(FP16_MAX / 4 + 10)
    assert "47.0 dB PSNR" in verdict(10.0, HalfRun(True, 0.1, 0.1, 47.0))
    assert "not finite" in verdict(10.0, HalfRun(False, None, None, None))
    assert verdict(10.0, HalfRun(True, 0.0, 0.0, math.inf)) is None


def test_no_images_and_wrong_images_are_refused():
    with pytest.raises(DataError, match="has no images"):
        audit_half(blocks(2), [])
    with pytest.raises(ImageError, match="multiples of 2"):
        audit_half(blocks(2), [torch.zeros(1, 3, 7, 8)])


def test_a_cpu_runs_the_middle_of_the_first_images_in_half_precision(monkeypatch):
    """All images count for the maxima; half precision sees 8x8 pixels of two."""
    monkeypatch.setattr(half, "CPU_SIDE", 9)
    monkeypatch.setattr(half, "CPU_PIXELS", 100)
    x = torch.zeros(3, 3, 12, 16)
    x[:, :, 2:10, 4:12] = torch.rand(3, 3, 8, 8) * 2 - 1
    found = audit_half(blocks(2), [x, 50 * x])
    assert (found.images, found.half_images) == (6, 2)
    assert found.encoder["encoder"] > 10
    middle = audit_half(blocks(2), [x[:2, :, 2:10, 4:12]])
    assert found.runs == middle.runs


def test_large_batches_and_a_model_with_one_stage_a_coder():
    model = blocks(2, 1)
    with torch.no_grad():
        model.gain.fill_(3.0)
    batch = torch.zeros(70, 1, 4, 4)
    batch[69] = 0.5
    found = audit_half(model, [batch, torch.zeros(1, 1, 2, 2)])  # also of one latent pixel
    assert found.images == found.half_images == 71
    assert found.encoder == {"encoder": 1.5}
    assert found.decoder == {"decoder": pytest.approx(4.5, abs=1e-4)}
    assert found.obstacle is None


def test_a_deep_compression_autoencoder_has_the_stages_of_its_own():
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    values = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shape.items()}
    model = AutoencoderDC(AutoencoderDCConfig(latent_channels=8, **values)).eval()
    found = audit_half(model, [torch.rand(2, 3, 8, 12) * 2 - 1])
    assert list(found.encoder) == ["conv_in", "down_blocks.0", "down_blocks.1", "conv_out"]
    assert list(found.decoder) == ["conv_in", "up_blocks.1", "up_blocks.0", "norm_out", "conv_out"]
    assert found.runs["fp16"].finite


def test_a_model_that_can_not_be_traced_is_refused_in_one_line():
    class Branching(LinearAutoencoder):
        def _decode(self, z, keep_features):
            return super()._decode(z if z.sum() > 0 else -z, keep_features)

    model = Branching(LinearAutoencoderConfig(latent_channels=4, patch=8))
    with pytest.raises(ModelError, match="can't trace this Branching") as caught:
        audit_half(model, [torch.zeros(1, 3, 16, 16)])
    assert len(str(caught.value).splitlines()) == 1
