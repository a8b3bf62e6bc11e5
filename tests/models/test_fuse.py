"""The fused steps in diffusers' AutoencoderKL and AutoencoderDC."""

from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend
from small_models import DC_TWO_LEVELS
from torch import nn

import latentae
from latentae.errors import ModelError

diffusers = pytest.importorskip("diffusers")


def build(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=32,
    ).to(dtype)


def build_dc(dtype=torch.float32, **changes) -> nn.Module:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(**{**DC_TWO_LEVELS, **changes}).eval()
    for name, p in vae.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return vae.to(dtype)


# diffusers' AutoencoderDC computes statistics in fp32, so it is no reference in fp64
KINDS = {
    "kl": (build, torch.float64, {"rtol": 1e-8, "atol": 1e-11}),
    "dc": (build_dc, torch.float32, {"rtol": 1e-3, "atol": 1e-5}),
    "dc, batch norm": (
        lambda: build_dc(decoder_norm_types=("batch_norm", "rms_norm")),
        torch.float32,
        {"rtol": 1e-3, "atol": 1e-5},
    ),
    "dc, silu": (lambda: build_dc(decoder_conv_act_fn="silu"), torch.float32, {"rtol": 1e-3, "atol": 1e-5}),
}


def images(size: int = 16, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, size, size + 4, dtype=dtype)


def outputs(vae, x) -> list[torch.Tensor]:
    made = vae.encode(x)
    if hasattr(made, "latent"):
        return [made.latent, vae.decode(made.latent).sample]
    return [made.latent_dist.mean, made.latent_dist.logvar, vae.decode(made.latent_dist.mean).sample]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_outputs_and_gradients_stay(backend, kind):
    make, dtype, tolerance = KINDS[kind]
    vae, x = make(), images(12, dtype)[:1]
    parameters = list(vae.parameters())
    expected = outputs(vae, x)
    count = len(expected)
    expected += torch.autograd.grad(expected[-1].square().mean(), parameters, allow_unused=True)
    keys = list(vae.state_dict())
    fusion = latentae.fuse(vae)
    with use_backend(backend):
        found = outputs(vae, x)
        found += torch.autograd.grad(found[-1].square().mean(), parameters, allow_unused=True)
        with torch.no_grad():
            quick = outputs(vae, x)
    assert list(vae.state_dict()) == keys
    assert [id(p) for p in vae.parameters()] == [id(p) for p in parameters]
    for ours, theirs in zip((*found, *quick), (*expected, *expected[:count]), strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, **tolerance)
    assert not fusion.left


@pytest.mark.parametrize(
    ("kind", "counts"),
    [
        ("kl", {"residual blocks": 10, "levels": 4, "middle blocks": 2, "upsamplers": 1,
                "attention normalizations": 2, "output normalizations": 2}),
        # three attention blocks, each with one norm in the attention and one after the convolutions
        ("dc, silu", {"residual blocks": 2, "RMS normalizations": 2 + 3 * 2, "output normalizations": 1}),
    ],
)  # fmt: skip
def test_it_says_what_it_replaced_and_undoes_itself(kind, counts):
    make, dtype, tolerance = KINDS[kind]
    vae, x = make(), images(dtype=dtype)
    before = outputs(vae, x)
    fusion = latentae.fuse(vae)
    assert {kind: len(names) for kind, names in fusion.replaced.items()} == counts
    assert str(fusion).startswith("fused: ")
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    fusion.undo()
    fusion.undo()
    with latentae.fuse(vae):
        assert any("forward" in module.__dict__ for module in vae.modules())
    assert all("forward" not in module.__dict__ for module in vae.modules())
    assert vae.decoder.conv_in.weight.is_contiguous()
    for ours, theirs in zip(outputs(vae, x), before, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize(
    ("make", "dtype"), [(build, torch.float32), (build, torch.bfloat16), (build_dc, torch.bfloat16)]
)
def test_errors_are_those_of_the_dtype(make, dtype):
    vae, x = make(dtype), images().to(dtype)
    exact = copy.deepcopy(vae).double()
    truth, plain = outputs(exact, x.double()), outputs(vae, x)
    latentae.fuse(vae)
    for backend in ("torch", "triton"):
        with use_backend(backend), torch.no_grad():
            found = outputs(vae, x)
        for ours, theirs, want in zip(found, plain, truth, strict=True):
            assert ours.dtype == dtype
            # two ways of rounding: equal errors but for chance
            assert (ours.double() - want).norm() <= 1.5 * (theirs.double() - want).norm() + 1e-6 * want.norm()


def test_tiling_and_slicing_go_on():
    vae, z = build(), torch.randn(3, 4, 32, 32, dtype=torch.float64)
    vae.enable_slicing()
    vae.enable_tiling()
    vae.tile_latent_min_size = 16
    with torch.no_grad():
        expected = vae.decode(z).sample
        with latentae.fuse(vae):
            torch.testing.assert_close(vae.decode(z).sample, expected)
        vae.disable_tiling()
        assert not torch.allclose(
            vae.decode(z).sample, expected, rtol=1e-9, atol=1e-9
        )  # tiles were really used
    vae, z = build_dc(), torch.randn(1, 4, 12, 12)
    vae.enable_tiling(16, 16, 12, 12)
    with torch.no_grad():
        expected = vae.decode(z).sample
        with latentae.fuse(vae.decoder):  # half a model
            torch.testing.assert_close(vae.decode(z).sample, expected, rtol=1e-3, atol=1e-5)


def test_attention_stays_diffusers_own():
    from diffusers.models.attention_processor import AttnProcessor

    vae, x = build(), images()
    expected = outputs(vae, x)
    with latentae.fuse(vae):
        vae.set_attn_processor(AttnProcessor())
        for ours, theirs in zip(outputs(vae, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_a_fused_copy_stands_on_its_own():
    vae, x = build(), images()
    latentae.fuse(vae)
    other = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    assert outputs(other, x)[2].abs().max() > 0.01
    assert outputs(vae, x)[2].abs().max() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_hooks_see_tensors_and_fire(backend):
    vae, x, seen = build(), images(), []
    with torch.no_grad():
        expected = outputs(vae, x)
    latentae.fuse(vae)
    vae.encoder.down_blocks[0].resnets[0].register_forward_hook(lambda m, i, o: seen.append(o))
    vae.decoder.mid_block.resnets[1].conv2.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad(), use_backend(backend):
        found = outputs(vae, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert [type(t) for t in seen] == [torch.Tensor, torch.Tensor]
    vae = build_dc()
    latentae.fuse(vae)
    vae.encoder.down_blocks[0][0].conv1.register_forward_hook(lambda m, i, o: seen.append(o))
    vae.encode(x.float())
    assert len(seen) == 3


@pytest.mark.parametrize("order", ["fuse, then offload", "fuse, then cast", "cast, then fuse"])
def test_hooks_that_change_weights_are_not_passed_by(order):
    """Offloading keeps weights on "meta", layerwise casting in 8 bits: both need their hooks."""
    from accelerate import cpu_offload

    def hook(vae):
        if "offload" in order:
            cpu_offload(vae, execution_device=torch.device("cpu"))
        else:
            vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
            assert vae.decoder.conv_in.weight.dtype == torch.float8_e4m3fn

    vae, plain, x = build(torch.float32), build(torch.float32), images(dtype=torch.float32)
    hook(plain)
    if order.startswith("cast"):
        hook(vae)
    fusion = latentae.fuse(vae)
    if order.startswith("fuse"):
        hook(vae)
    with torch.no_grad():
        expected = outputs(plain, x)
        found = outputs(vae, x)
        fusion.undo()
        found += outputs(vae, x)
    assert not fusion.left
    for ours, theirs in zip(found, expected + expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    vae, x = build(), images(8)[:1]
    latentae.fuse(vae)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            vae.enable_gradient_checkpointing()
        vae.train()
        with use_backend("triton"):
            loss = outputs(vae, x)[2].square().mean()
            gradients.append(torch.autograd.grad(loss, list(vae.decoder.parameters())))
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once)


def test_blocks_that_do_something_else_are_left_and_named():
    class LoRAConv(nn.Conv2d):
        pass

    vae, x = build(), images()
    block = vae.decoder.mid_block.resnets[0]
    block.conv1.__class__ = LoRAConv
    vae.encoder.mid_block.resnets[0].dropout = nn.Dropout(0.1)
    vae.encoder.mid_block.resnets[1].nonlinearity = nn.GELU()
    vae.eval()
    expected = outputs(vae, x)
    fusion = latentae.fuse(vae)
    assert fusion.left == {
        "decoder.mid_block.resnets.0": "conv1: it is a LoRAConv, not a plain Conv2d",
        "encoder.mid_block.resnets.0": "it scales its output or drops activations",
        "encoder.mid_block.resnets.1": "nonlinearity: it is a GELU, not a plain SiLU",
    }
    assert "left decoder.mid_block.resnets.0: conv1" in str(fusion)
    for ours, theirs in zip(outputs(vae, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_it_compiles_as_one_graph():
    vae, z = build().eval(), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    latentae.fuse(vae)
    with torch.no_grad(), use_backend("triton"):
        expected = vae.decoder(z)
        compiled = torch.compile(lambda z: vae.decoder(z), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), expected)


def test_what_can_not_be_fused_says_so():
    from diffusers.models.normalization import RMSNorm

    vae = build_dc()
    vae.encoder.down_blocks[0][0].norm = RMSNorm(8, 1e-5, elementwise_affine=False)
    assert latentae.fuse(vae).left == {"encoder.down_blocks.0.0.norm": "it has no weight for each channel"}
    with pytest.raises(ModelError, match="give a diffusers AutoencoderKL or AutoencoderDC"):
        latentae.fuse(nn.Sequential(RMSNorm(8, 1e-5)))
    with pytest.raises(
        ModelError, match=r"nothing to replace in Sequential .* give a diffusers AutoencoderKL"
    ):
        latentae.fuse(nn.Sequential(nn.Conv2d(3, 3, 1)))
    vae = build()
    latentae.fuse(vae)
    with pytest.raises(ModelError, match="its forward has been replaced already"):
        latentae.fuse(vae)
