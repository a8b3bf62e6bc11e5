"""The fused steps in diffusers' AutoencoderDC."""

from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend

import latentae
from latentae.errors import ModelError

diffusers = pytest.importorskip("diffusers")

VALUES = {
    "latent_channels": 4,
    "attention_head_dim": 8,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (8, 16),
    "decoder_block_out_channels": (8, 16),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 2),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (5,)),
}


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderDC(**{**VALUES, **changes}).eval()
    for name, p in vae.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return vae.to(dtype)


def outputs(vae, x):
    latent = vae.encode(x).latent
    return latent, vae.decode(latent).sample


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_outputs_and_gradients_stay(backend, act):
    vae, x = build(decoder_conv_act_fn=act), torch.randn(1, 3, 12, 16)
    parameters = list(vae.parameters())
    expected = outputs(vae, x)
    expected += torch.autograd.grad(expected[1].square().mean(), parameters)
    keys = list(vae.state_dict())
    fusion = latentae.fuse(vae)
    with use_backend(backend):
        found = outputs(vae, x)
        found += torch.autograd.grad(found[1].square().mean(), parameters)
        with torch.no_grad():
            quick = outputs(vae, x)
    assert list(vae.state_dict()) == keys
    assert [id(p) for p in vae.parameters()] == [id(p) for p in parameters]
    for ours, theirs in zip((*found, *quick), (*expected, *expected[:2]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    assert not fusion.left


def test_it_says_what_it_replaced_and_undoes_itself():
    vae, x = build(decoder_conv_act_fn="silu"), torch.randn(1, 3, 16, 16)
    before = outputs(vae, x)
    fusion = latentae.fuse(vae)
    counts = {kind: len(names) for kind, names in fusion.replaced.items()}
    # two ResBlocks; each of three attention blocks has one norm in the attention and one after the convolutions
    assert counts == {"residual blocks": 2, "RMS normalizations": 2 + 3 * 2, "output normalizations": 1}
    assert vae.decoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    fusion.undo()
    assert all("forward" not in module.__dict__ for module in vae.modules())
    assert all(torch.equal(a, b) for a, b in zip(outputs(vae, x), before, strict=True))


def test_batch_normalization_is_called_as_it_is():
    vae, x = build(decoder_norm_types=("batch_norm", "rms_norm")), torch.randn(2, 3, 16, 16)
    expected = outputs(vae, x)
    with latentae.fuse(vae):
        for ours, theirs in zip(outputs(vae, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bf16_is_no_further_from_fp32_than_diffusers(backend):
    vae, x = build(torch.bfloat16), torch.randn(1, 3, 16, 16)
    exact = outputs(copy.deepcopy(vae).float(), x.bfloat16().float())
    plain = outputs(vae, x.bfloat16())
    latentae.fuse(vae)
    with use_backend(backend), torch.no_grad():
        found = outputs(vae, x.bfloat16())
    for ours, theirs, want in zip(found, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - want).norm() <= 1.3 * (theirs.float() - want).norm()


def test_hooks_on_a_convolution_fire():
    vae, x, seen = build(), torch.randn(1, 3, 16, 16), []
    latentae.fuse(vae)
    vae.encoder.down_blocks[0][0].conv1.register_forward_hook(lambda m, i, o: seen.append(o))
    vae.encode(x)
    assert len(seen) == 1


def test_half_a_model_and_tiling_work_too():
    vae, z = build(), torch.randn(1, 4, 12, 12)
    vae.enable_tiling(16, 16, 12, 12)
    with torch.no_grad():
        expected = vae.decode(z).sample
        with latentae.fuse(vae.decoder):
            torch.testing.assert_close(vae.decode(z).sample, expected, rtol=1e-4, atol=1e-5)


def test_a_norm_of_another_place_or_kind_is_left():
    from diffusers.models.normalization import RMSNorm

    vae = build()
    vae.encoder.down_blocks[0][0].norm = RMSNorm(8, 1e-5, elementwise_affine=False)
    fusion = latentae.fuse(vae)
    assert fusion.left == {"encoder.down_blocks.0.0.norm": "it has no weight for each channel"}
    with pytest.raises(ModelError, match="give a diffusers AutoencoderKL or AutoencoderDC"):
        latentae.fuse(torch.nn.Sequential(RMSNorm(8, 1e-5)))
