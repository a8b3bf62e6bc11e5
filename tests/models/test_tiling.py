from __future__ import annotations

import contextlib
import copy
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_models import halo, randomize_norms
from torch import nn

from latentae.errors import ImageError, ModelError, OutputError, RecipeError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import preset
from latentae.models.tiling import Tiled, strips
from latentae.models.tiling import tiled as tiled_module
from latentae.models.tiling.blended import UNUSED, Source
from latentae.models.tiling.steps import (
    Affine,
    Step,
    change,
    decoder_steps,
    encoder_steps,
    run,
    split_decoder,
    split_encoder,
)

NARROW = {"block_out_channels": (16, 16, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
ATTENTION = {"down_block_types": ("DownEncoderBlock2D", *("AttnDownEncoderBlock2D",) * 2)}
ATTENTION |= {"up_block_types": (*("AttnUpDecoderBlock2D",) * 2, "UpDecoderBlock2D")}
PLAIN = {1: {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}}
PLAIN[2] = {key: 2 * value for key, value in PLAIN[1].items()}
SHAPES = {
    "f8, attention in the middle": ("kl-f8", NARROW),
    "f4, no attention, one group": ("tiny", {}),
    "f4, attention at two levels": ("kl-f4", {**NARROW, **ATTENTION, "block_out_channels": (8, 8, 16)}),
    "f2, no 1x1 convolutions": (
        "tiny",
        {"block_out_channels": (8, 8), **PLAIN[2], "use_quant_conv": False, "use_post_quant_conv": False},
    ),
    "f1, attention": ("tiny", {"block_out_channels": (16,), **PLAIN[1], "mid_block_add_attention": True}),
}


def build(name: str, dtype: torch.dtype = torch.float64, **replaced) -> AutoencoderKL:
    return randomize_norms(
        AutoencoderKL(preset(name, **replaced)).eval().to(dtype), 0.2
    )  # as trained: no two channels alike


def picture(height: int, width: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Smooth colors, dark at one corner, with fine structure in one half: its tiles differ."""
    y, x = torch.linspace(-1, 1, height, dtype=dtype).view(-1, 1), torch.linspace(-1, 1, width, dtype=dtype)
    base = torch.stack([torch.sin(3 * y + x), y * x, torch.cos(2 * x) * y])
    noise = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    return (0.6 * base + 0.3 * noise * (x > 0))[None].clamp(-1, 1)


@torch.no_grad()
def psnr(found: torch.Tensor, whole: torch.Tensor) -> float:
    """Against the spread of the full image, so that latents and images are judged alike."""
    return float(10 * torch.log10(whole.var() / (found - whole).square().mean()))


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_is_the_untiled_result(shape):
    name, replaced = SHAPES[shape]
    model = build(name, **replaced)
    f, z = model.config.downsampling, model.config.latent_channels
    tiled = Tiled(model, "exact", tile=4 * f)
    with torch.no_grad():
        image = torch.cat([picture(11 * f, 5 * f), -picture(11 * f, 5 * f)])
        latent = torch.randn(2, z, 5, 11, dtype=torch.float64)
        found, whole = tiled.encode(image), model.encode(image)
        assert found.mean.shape == whole.mean.shape
        torch.testing.assert_close(found.mean, whole.mean, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.logvar, whole.logvar, rtol=0, atol=1e-10)
        torch.testing.assert_close(tiled.decode(latent), model.decode(latent), rtol=0, atol=1e-10)


@pytest.mark.slow
def test_exact_at_full_size():
    """Equal in fp64; in fp32 nearer to fp64 than the model, whose GroupNorm sums in fp32."""
    precise = build("kl-f8", **NARROW)
    model = copy.deepcopy(precise).float()
    with torch.no_grad():
        image = picture(1024, 776)
        latent = precise.encode(image).mean
        for step, x, whole in ((0, image, latent), (1, latent, precise.decode(latent))):
            found, narrow, own = (
                (each.decode(given) if step else each.encode(given).mean)
                for each, given in (
                    (Tiled(precise, "exact", tile=256), x),
                    (Tiled(model, "exact", tile=256), x.float()),
                    (model, x.float()),
                )
            )
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)
            assert (narrow - whole).abs().max() < 1e-4
            assert (narrow - whole).square().mean() < 1.1 * (own - whole).square().mean()


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_with_the_true_statistics_blended_is_the_untiled_result(shape, monkeypatch):
    """So all of blended's error is that of its statistics, and no tile shows."""
    name, replaced = SHAPES[shape]
    model = build(name, **replaced)
    f, z = model.config.downsampling, model.config.latent_channels
    fine, (coarse, finer) = split_encoder(encoder_steps(model))[0], split_decoder(decoder_steps(model))
    monkeypatch.setattr(tiled_module, "estimate", true_statistics)
    for step, reach in (("encode", halo(fine, 1)), ("decode", halo(finer, round(f * change(coarse))))):
        tile = max(4, math.ceil((reach / UNUSED + 2 * f) / 0.45 / f)) * f
        tiled = Tiled(model, tile=tile, overlap=0.45)
        height, width = 2 * tile - 3 * f, tile + f
        if step == "encode":
            image = picture(height, width)
            found, whole = tiled.encode(image).mean, model.encode(image).mean
        else:
            latent = torch.randn(1, z, height // f, width // f, dtype=torch.float64)
            found, whole = tiled.decode(latent), model.decode(latent)
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-9)


def true_statistics(steps: list[Step], source: Source, tile: int) -> dict[nn.GroupNorm, Affine]:
    known = {}

    def norms(norm: nn.GroupNorm, x: torch.Tensor) -> Affine:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        known[norm] = strips.affine(norm, strips.Moments(1, mean.double().numpy(), variance.double().numpy()))
        return known[norm]

    run(steps, source.cut(0, 0, source.height, source.width), norms)
    return known


def test_an_image_no_larger_than_a_tile_is_the_models_own():
    model = build("tiny")
    image = picture(32, 64)
    tiled = Tiled(model, tile=64)
    with torch.no_grad():
        posterior = model.encode(image)
        torch.testing.assert_close(tiled.encode(image).mean, posterior.mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(
            tiled.decode(posterior.mean), model.decode(posterior.mean), rtol=0, atol=1e-14
        )


@torch.no_grad()
def test_blended_beats_diffusers_at_the_same_tile_and_cost(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = build("kl-f8", torch.float32, **NARROW)
    model.save_pretrained(tmp_path)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path).eval()
    theirs.enable_tiling()
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 128, 16
    tiled = Tiled(model, tile=128, overlap=0.125)  # 25 tiles and 2 samples; diffusers computes 27.6
    image = picture(512, 512, torch.float32)
    latent = model.encode(image).mean
    for whole, ours, their in (
        (latent, tiled.encode(image).mean, theirs.encode(image).latent_dist.mean),
        (model.decode(latent), tiled.decode(latent), theirs.decode(latent).sample),
    ):
        assert psnr(ours, whole) > psnr(their, whole) + 6  # half of its error
        assert (ours - whole).abs().max() < (their - whole).abs().max()


@pytest.mark.parametrize("mode", ["exact", "blended"])
def test_without_a_gradient_image_by_image_and_in_half_precision(mode):
    model = build("tiny", torch.float32)
    latent = torch.randn(2, 8, 20, 24) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    wide = Tiled(model, mode, tile=48).decode(latent)
    assert not wide.requires_grad
    torch.testing.assert_close(wide[1:], Tiled(model, mode, tile=48).decode(latent[1:]))  # image by image
    if mode == "exact":
        torch.testing.assert_close(wide, model.decode(latent), rtol=0, atol=1e-5)
    half = Tiled(model.to(torch.bfloat16), mode, tile=48).decode(latent.bfloat16())
    assert half.dtype == torch.bfloat16
    assert psnr(half.float(), wide) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "fast"}, "mode is 'fast', expected blended or exact"),
        ({"tile": 12}, "tile is 12 pixels, expected a multiple of 4 and at least 16"),
        ({"tile": 66}, "tile is 66 pixels"),
        ({"overlap": 0.5}, "overlap is 0.5"),
        ({"overlap": -0.1}, "overlap is -0.1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        Tiled(build("tiny"), **arguments)


def test_other_models_are_refused_and_wrong_shapes_are_the_models_errors():
    with pytest.raises(ModelError, match="takes an AutoencoderKL, this is a Identity"):
        Tiled(nn.Identity())
    tiled = Tiled(build("tiny"), "exact", tile=16)
    with pytest.raises(ImageError, match="multiples of 4"):
        tiled.encode(torch.zeros(1, 3, 30, 64, dtype=torch.float64))
    with pytest.raises(ModelError, match="expected \\[B, 8, h, w\\]"):
        tiled.decode(torch.zeros(1, 4, 64, 64, dtype=torch.float64))


def test_scratch_files_are_used_and_gone_afterwards_also_after_an_error(tmp_path, monkeypatch):
    model, latent = build("tiny"), torch.randn(1, 8, 20, 24, dtype=torch.float64)
    tiled = Tiled(model, "exact", tile=32, scratch=tmp_path)
    written = []
    put = strips.Map.put

    def counting(self, start, strip):
        put(self, start, strip)
        written.append(strip.nbytes)
        if len(written) == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(strips.Map, "put", counting)
    stop = -1
    tiled.decode(latent)
    assert sum(written) > 10 * latent.nbytes
    stop = len(written) + 20
    with pytest.raises(KeyboardInterrupt):
        tiled.decode(latent)
    assert list(tmp_path.iterdir()) == []
    open_files = []
    for link in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):  # closed meanwhile
            open_files.append(str(link.readlink()))
    assert not [name for name in open_files if str(tmp_path) in name]


def test_a_scratch_folder_that_does_not_do_is_named(tmp_path, monkeypatch):
    latent = torch.randn(1, 8, 20, 24, dtype=torch.float64)
    with pytest.raises(OutputError, match="missing"):
        Tiled(build("tiny"), "exact", tile=32, scratch=tmp_path / "missing").decode(latent)
    monkeypatch.setattr(strips.shutil, "disk_usage", lambda _: SimpleNamespace(total=1, used=1, free=0))
    with pytest.raises(OutputError, match=r"0\.0 GiB free.*larger disk"):
        Tiled(build("tiny"), "exact", tile=32, scratch=tmp_path).decode(latent)


MEMORY = """
import sys, torch
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import preset
from latentae.models.tiling import Tiled

def status(field):
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(1)
torch.manual_seed(0)
config = preset("kl-f8", block_out_channels=(64, 64, 64, 64), norm_num_groups=8, layers_per_block=1)
model = AutoencoderKL(config).eval()
tiled = Tiled(model, sys.argv[1], tile=128, scratch=sys.argv[2])
tiled.decode(torch.randn(1, 4, 20, 20))  # loads what stays loaded
latent = torch.randn(1, 4, int(sys.argv[3]), int(sys.argv[3]))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
tiled.decode(latent)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="resident memory is read from Linux's /proc"
)
@pytest.mark.parametrize("mode", ["exact", "blended"])
def test_memory_is_bounded_by_the_tile(mode, tmp_path):
    """docs/tiling.md: output, and 6 times the values that a tile has where channels are most."""
    side = 96
    command = [sys.executable, "-c", MEMORY, mode, str(tmp_path), str(side)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    image, tile = 3 * (8 * side) ** 2 * 4, 64 * 128 * 128 * 4
    assert int(done.stdout) < image + 6 * tile + 2**25
    # one map of the full image would not fit
    assert image + 6 * tile + 2**25 < 64 * (8 * side) ** 2 * 4
