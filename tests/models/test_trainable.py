from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import PRESETS, preset
from latentae.models.trainable import select_trainable

PARTS = {
    "all": ("",),
    "decoder": ("post_quant_conv.", "decoder."),
    "decoder-head": ("decoder.up_blocks.{last}.", "decoder.conv_norm_out.", "decoder.conv_out."),
    "encoder": ("encoder.", "quant_conv."),
    "latent": (
        "encoder.down_blocks.{last}.", "encoder.mid_block.", "encoder.conv_norm_out.", "encoder.conv_out.", "quant_conv.",
        "post_quant_conv.", "decoder.conv_in.", "decoder.mid_block.", "decoder.up_blocks.0.",
    ),
}  # fmt: skip


def model(name: str = "kl-f8", **overrides) -> AutoencoderKL:
    widths = PRESETS[name]["block_out_channels"]
    narrow = tuple(8 * w // widths[0] for w in widths)
    return AutoencoderKL(preset(name, block_out_channels=narrow, norm_num_groups=4, **overrides))


def image(autoencoder: AutoencoderKL, factor: int = 2) -> torch.Tensor:
    side = factor * autoencoder.config.downsampling
    return torch.rand(2, 3, side, side) * 2 - 1


def kept_bytes(autoencoder: AutoencoderKL, x: torch.Tensor) -> int:
    """Bytes that the graph of a forward pass keeps beside the parameters."""
    own, storages = {p.untyped_storage().data_ptr() for p in autoencoder.parameters()}, {}

    def remember(t):
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        output = autoencoder(x)
    del output
    return sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in own)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["kl-f8", "kl-f16", "tiny"])
def test_each_parameter_of_the_part_learns_and_no_other_changes(name, part):
    autoencoder = model(name)
    select_trainable(autoencoder, part)
    last = len(autoencoder.config.block_out_channels) - 1
    inside = tuple(prefix.format(last=last) for prefix in PARTS[part])
    expected = {key for key, _ in autoencoder.named_parameters() if key.startswith(inside)}
    assert {key for key, p in autoencoder.named_parameters() if p.requires_grad} == expected

    before, optimizer = (
        copy.deepcopy(autoencoder.state_dict()),
        torch.optim.AdamW(autoencoder.parameters(), lr=0.1, weight_decay=0.1),
    )
    autoencoder(image(autoencoder)).reconstruction.square().mean().backward()
    assert {key for key, p in autoencoder.named_parameters() if p.grad is not None} == expected
    optimizer.step()
    assert {key for key, p in autoencoder.state_dict().items() if not torch.equal(p, before[key])} == expected


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("quant", [True, False])
def test_gradients_are_those_of_the_whole_model(part, quant):
    autoencoder = model(use_quant_conv=quant, use_post_quant_conv=quant).double()
    x, noise = image(autoencoder).double(), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    expected = dict(
        zip(
            [name for name, _ in autoencoder.named_parameters()],
            torch.autograd.grad(autoencoder(x, noise).reconstruction.square().mean(), list(autoencoder.parameters())),
            strict=True,
        )
    )
    select_trainable(autoencoder, part)
    for autoencoder.gradient_checkpointing in (False, True):
        autoencoder.zero_grad()
        autoencoder(x, noise).reconstruction.square().mean().backward()
        for name, p in autoencoder.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("part", ["decoder-head", "latent"])
def test_the_kernels_pass_on_what_a_frozen_level_leaves_to_add(part):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = preset("kl-f8", block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1, **levels)
    autoencoder, x = AutoencoderKL(config).double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    select_trainable(autoencoder, part)
    learning, results = [p for p in autoencoder.parameters() if p.requires_grad], []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            loss = autoencoder(x, sample_posterior=False).reconstruction.square().mean()
            results.append([loss, *torch.autograd.grad(loss, learning)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("part", ["decoder", "decoder-head"])
def test_the_latent_is_that_of_inference(part):
    autoencoder = model()
    x = image(autoencoder)
    with torch.no_grad():
        expected = autoencoder.encode(x).mode()
    select_trainable(autoencoder, part)
    latent = autoencoder(x, sample_posterior=False).latent
    assert torch.equal(latent, expected)
    assert not latent.requires_grad


def test_frozen_layers_in_front_keep_nothing():
    autoencoder = model()
    x = image(autoencoder, 8)
    kept = {}
    for part in PARTS:
        select_trainable(autoencoder, part)
        kept[part] = kept_bytes(autoencoder, x)
    alone = model()
    decoder_only = torch.nn.Sequential(alone.post_quant_conv, alone.decoder)
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        output = decoder_only(torch.randn(2, 4, 8, 8))
    own = {p.untyped_storage().data_ptr() for p in alone.parameters()}
    lone = sum(t.untyped_storage().nbytes() for address, t in storages.items() if address not in own)
    del output
    assert kept["decoder"] == lone
    assert kept["decoder-head"] < 0.6 * kept["decoder"]
    assert kept["decoder"] < 0.7 * kept["all"]


def test_parts_can_be_chosen_one_after_another():
    autoencoder = model("tiny")
    for part in (*PARTS, "all"):
        select_trainable(autoencoder, part)
    assert all(p.requires_grad for p in autoencoder.parameters())


def test_an_unknown_part_is_refused():
    with pytest.raises(ModelError, match=r"unknown part 'tail'.*decoder-head"):
        select_trainable(model("tiny"), "tail")  # pyright: ignore[reportArgumentType]
