"""A start at PCA: latents and reconstructions of an AutoencoderDC are those of PCA."""

from __future__ import annotations

import pytest
import torch
from small_models import weights_that_do_not_learn

from latentae.data.transforms import to_float, to_uint8
from latentae.errors import ModelError
from latentae.measures.metrics import psnr
from latentae.models.config import build
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.dc.head_start import start_at_pca
from latentae.models.pca import PatchPCA, fit_pca, sketch_pca
from latentae.models.presets import preset

ATTENDING = {
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "layers_per_block": (1, 1, 1, 1),
    "encoder_qkv_multiscales": ((), (), (5,), ()),
    "decoder_qkv_multiscales": ((), (), (5,), ()),
}
EXACT = {
    "as the preset": {},
    "attention": ATTENDING,
    "a posterior": {"bottleneck": "gaussian"},
    "no shortcut at the latent": {"encoder_out_shortcut": False, "decoder_in_shortcut": False},
    "no blocks at full size": {"layers_per_block": (0, 1, 1, 0)},
    "narrow at full size": {"block_out_channels": (12, 48, 96, 192), "latent_channels": 2},
    "one component": {"block_out_channels": (48, 48, 96, 192), "latent_channels": 1},
    "gray": {"in_channels": 1, "latent_channels": 8},
    "four channels": {"in_channels": 4, "block_out_channels": (32, 64, 128, 256)},
    "strided": {"downsample_block_type": "conv", "block_out_channels": (24, 24, 48, 192)},
    "silu at the end": {"decoder_conv_act_fn": "silu"},
    "gelu at the end": {"decoder_conv_act_fn": "gelu"},
    "frozen statistics": {"decoder_norm_types": "batch_norm", "decoder_act_fns": "relu"},
    "f4": {"block_out_channels": (24, 48, 96), "layers_per_block": (1, 1, 0), "latent_channels": 8},
    "f2": {"block_out_channels": (24, 48), "layers_per_block": (1, 0), "latent_channels": 4},
}


def pictures(channels: int = 3, count: int = 48, side: int = 64) -> torch.Tensor:
    """Edges at several scales, and noise: uint8 [N, C, H, W] with a photo's spectrum."""
    generator = torch.Generator().manual_seed(5)
    image = torch.zeros(count, channels, side, side)
    for size in (2, 4, 8, 16, 32, 64):
        coarse = torch.randn(count, channels, size, size, generator=generator)
        mixed = coarse + coarse.mean(1, keepdim=True)
        image += torch.nn.functional.interpolate(mixed, size=(side, side), mode="nearest") / size**0.8
    return to_uint8(0.1 + 0.25 * image + 0.04 * torch.randn(image.shape, generator=generator))


def started(options: dict, images: torch.Tensor, whiten: bool = True) -> tuple[AutoencoderDC, PatchPCA]:
    model = build(preset("dc-tiny", **options))
    assert isinstance(model, AutoencoderDC)
    pca = fit_pca(images, model.config.downsampling, model.config.latent_channels)
    start_at_pca(model, pca, images, whiten=whiten)
    return model.eval(), pca


@torch.no_grad()
def quality(model: AutoencoderDC, images: torch.Tensor) -> float:
    return (
        psnr(images, to_uint8(model(to_float(images), sample_posterior=False).reconstruction)).mean().item()
    )


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_step_0_is_the_pca_codec(options):
    images = pictures(options.get("in_channels", 3))
    model, pca = started(options, images[8:])
    held_out = images[:8]
    with torch.no_grad():
        latent = model.encode(to_float(held_out)).mode()
    expected = pca.encode(held_out) / pca.variances.sqrt()[:, None, None]
    torch.testing.assert_close(latent.double(), expected, atol=2e-3, rtol=0)
    assert quality(model, held_out) == pytest.approx(
        psnr(held_out, pca.reconstruct(held_out)).mean().item(), abs=0.1
    )
    assert len(model.encode(to_float(held_out)).logvar.unique()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "lost"), [("dc-f8", 0.02), ("dc-f16", 0.02), ("dc-f32-z32", 0.3)])
def test_the_widths_of_the_presets_carry_it(shape, lost):
    config = preset(shape, layers_per_block=1)
    model = build(config)
    assert isinstance(model, AutoencoderDC)
    images = pictures(count=200, side=128)
    fit = fit_pca if config.downsampling <= 16 else sketch_pca
    pca = fit(images[4:], config.downsampling, config.latent_channels)
    start_at_pca(model, pca, images[4:].split(16))
    best = psnr(images[:4], pca.reconstruct(images[:4])).mean().item()
    assert best - lost < quality(model.eval(), images[:4]) < best + 0.1


def test_latents_are_whitened_or_components_as_they_are():
    images = pictures()
    model, _ = started({}, images)
    latent = model.encode(to_float(images)).mode()
    assert latent.std((0, 2, 3)).sub(1).abs().max() < 0.02
    assert latent.mean((0, 2, 3)).abs().max() < 0.02
    model, pca = started({}, images, whiten=False)
    latent = model.encode(to_float(images)).mode()
    torch.testing.assert_close(latent.double() * 127.5, pca.encode(images), atol=0.1, rtol=0)


def test_bf16_keeps_it():
    images = pictures()
    model, pca = started(ATTENDING, images)
    expected = psnr(images[:8], pca.reconstruct(images[:8])).mean().item()
    with torch.autocast("cpu", torch.bfloat16):
        assert quality(model, images[:8]) > expected - 0.2
    made = model.to(torch.bfloat16)(to_float(images[:8]).bfloat16(), sample_posterior=False).reconstruction
    assert psnr(images[:8], to_uint8(made.float())).mean().item() > expected - 0.3


@pytest.mark.parametrize(("widths", "loss"), [((24, 48, 96, 96), 0.3), ((16, 32, 32, 64), 2.0)])
def test_levels_that_are_too_narrow_keep_the_best_part(widths, loss):
    images = pictures()
    model, pca = started({"block_out_channels": widths}, images[8:])
    found, best = quality(model, images[:8]), psnr(images[:8], pca.reconstruct(images[:8])).mean().item()
    fewer = psnr(images[:8], pca.truncated(8).reconstruct(images[:8])).mean().item()
    assert max(best - loss, fewer) < found < best + 0.1


def test_every_weight_can_still_learn():
    images = pictures(count=16)
    model, _ = started(ATTENDING, images)
    assert weights_that_do_not_learn(model, to_float(images[:2])) == []


def test_what_cannot_start_at_pca_is_refused_before_anything_changes():
    images = pictures(count=16)
    pca = fit_pca(images, 8, 16)
    for options, message in (
        ({"upsample_block_type": "interpolate"}, "needs 'pixel_shuffle'"),
        ({"decoder_conv_act_fn": "mish"}, "needs one of relu, silu"),
        (
            {"latent_channels": 4},
            "16 components of patches of 8 pixels with 3 channels, the autoencoder 4 latent channels",
        ),
        ({"in_channels": 1}, "1 image channels"),
        ({"block_out_channels": (6, 12, 24, 48)}, "give it 7 or more"),
    ):
        model = build(preset("dc-tiny", **options))
        assert isinstance(model, AutoencoderDC)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ModelError, match=message):
            start_at_pca(model, pca, images)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), options


def test_images_may_come_in_batches_of_several_sizes():
    images = pictures(count=32)
    whole, pca = started({}, images)
    model = build(preset("dc-tiny"))
    assert isinstance(model, AutoencoderDC)
    torch.manual_seed(0)
    start_at_pca(model, pca, [images[:16], images[16:, :, :32], images[16:, :, 32:]])
    assert quality(model, images[:4]) == pytest.approx(quality(whole, images[:4]), abs=0.01)


@pytest.mark.parametrize("widths", [(24, 48, 96, 192), (24, 48, 96, 96)])
def test_images_that_say_little_make_a_finite_start(widths):
    for images in (torch.zeros(24, 3, 64, 64, dtype=torch.uint8), pictures(1, 24).expand(-1, 3, -1, -1)):
        model, pca = started({"block_out_channels": widths}, images)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        made = to_uint8(model(to_float(images[:4]), sample_posterior=False).reconstruction)
        assert (made.int() - pca.reconstruct(images[:4]).int()).abs().float().mean() < 1
