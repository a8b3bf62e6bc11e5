from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend
from small_models import dc_config, images_of, kept_bytes, narrow, two_levels

from latentae.errors import ModelError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.dc.autoencoder import AutoencoderDC

PARTS = {
    "all": ("",),
    "decoder": ("post_quant_conv.", "decoder."),
    "decoder-head": ("decoder.up_blocks.{last}.", "decoder.conv_norm_out.", "decoder.conv_out."),
    "encoder": ("encoder.", "quant_conv."),
    "latent": (
        "encoder.down_blocks.{last}.", "encoder.mid_block.", "encoder.conv_norm_out.", "encoder.conv_out.",
        "quant_conv.", "post_quant_conv.", "decoder.conv_in.", "decoder.mid_block.", "decoder.up_blocks.0.",
    ),
}  # fmt: skip
DC_PARTS = {
    **PARTS,
    "decoder-head": ("decoder.up_blocks.{fine}.", "decoder.norm_out.", "decoder.conv_out."),
    "latent": (
        "encoder.down_blocks.{last}.", "encoder.conv_out.", "encoder.conv_out_logvar.",
        "decoder.conv_in.", "decoder.up_blocks.{last}.",
    ),
}  # fmt: skip
EMPTY = {"encoder_layers_per_block": (0, 1, 0), "decoder_layers_per_block": (0, 1, 0)}
# name -> how it is built, and its finest and coarsest levels with blocks
MODELS = {
    "kl-f16": (lambda: AutoencoderKL(narrow("kl-f16")), PARTS, 0, 4),
    "tiny": (lambda: AutoencoderKL(narrow("tiny")), PARTS, 0, 2),
    "dc": (lambda: dc(), DC_PARTS, 0, 2),
    "dc, a posterior": (lambda: dc(bottleneck="gaussian"), DC_PARTS, 0, 2),
    "dc, empty ends": (lambda: dc(bottleneck="gaussian", **EMPTY), DC_PARTS, 1, 1),
}


def model(**overrides) -> AutoencoderKL:
    return AutoencoderKL(narrow("kl-f8", layers_per_block=1, **overrides))


def dc(**changes) -> AutoencoderDC:
    return AutoencoderDC(dc_config(**changes))


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", MODELS)
def test_each_parameter_of_the_part_learns_and_no_other_changes(name, part):
    build, parts, fine, last = MODELS[name]
    autoencoder = build()
    autoencoder.select_trainable(part)
    inside = tuple(prefix.format(fine=fine, last=last) for prefix in parts[part])
    expected = {key for key, _ in autoencoder.named_parameters() if key.startswith(inside)}
    assert {key for key, p in autoencoder.named_parameters() if p.requires_grad} == expected

    before = copy.deepcopy(autoencoder.state_dict())
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=0.1, weight_decay=0.1)
    autoencoder(images_of(autoencoder)).reconstruction.square().mean().backward()
    assert {key for key, p in autoencoder.named_parameters() if p.grad is not None} == expected
    optimizer.step()
    assert {key for key, p in autoencoder.state_dict().items() if not torch.equal(p, before[key])} == expected


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    "build",
    [
        model,
        lambda: model(use_quant_conv=False, use_post_quant_conv=False),
        lambda: dc(bottleneck="gaussian"),
    ],
    ids=["kl", "kl without 1x1", "dc"],
)
def test_gradients_are_those_of_the_whole_model(part, build):
    autoencoder = build().double()
    x, noise = images_of(autoencoder).double(), torch.randn(2, 4, 2, 2, dtype=torch.float64)
    autoencoder(x, noise).reconstruction.square().mean().backward()
    expected = {name: p.grad for name, p in autoencoder.named_parameters()}
    autoencoder.select_trainable(part)
    for autoencoder.gradient_checkpointing in (False, True):
        autoencoder.zero_grad()
        autoencoder(x, noise).reconstruction.square().mean().backward()
        for name, p in autoencoder.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("part", ["decoder-head", "latent"])
def test_the_kernels_pass_on_what_a_frozen_level_leaves_to_add(part):
    autoencoder, x = AutoencoderKL(two_levels()).double(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    autoencoder.select_trainable(part)
    learning, results = [p for p in autoencoder.parameters() if p.requires_grad], []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            loss = autoencoder(x, sample_posterior=False).reconstruction.square().mean()
            results.append([loss, *torch.autograd.grad(loss, learning)])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("build", "part"), [(model, "decoder"), (model, "decoder-head"), (dc, "decoder-head")]
)
def test_the_latent_is_that_of_inference(build, part):
    autoencoder = build()
    x = images_of(autoencoder)
    with torch.no_grad():
        expected = autoencoder.encode(x).mode()
    autoencoder.select_trainable(part)
    latent = autoencoder(x, sample_posterior=False).latent
    torch.testing.assert_close(latent, expected)
    assert not latent.requires_grad


def test_frozen_layers_in_front_keep_nothing():
    autoencoder = AutoencoderKL(narrow("kl-f8"))
    x = images_of(autoencoder, 8)
    kept = {}
    for part in PARTS:
        autoencoder.select_trainable(part)
        kept[part] = kept_bytes(autoencoder, lambda: autoencoder(x))
    decoder = torch.nn.Sequential(autoencoder.post_quant_conv, autoencoder.decoder)
    autoencoder.select_trainable("all")
    assert kept["decoder"] == kept_bytes(decoder, lambda: decoder(torch.randn(2, 4, 8, 8)))
    assert kept["decoder-head"] < 0.6 * kept["decoder"]
    assert kept["decoder"] < 0.7 * kept["all"]


def test_parts_can_be_chosen_one_after_another_and_an_unknown_one_is_refused():
    autoencoder = model()
    for part in (*PARTS, "all"):
        autoencoder.select_trainable(part)
    assert all(p.requires_grad for p in autoencoder.parameters())
    with pytest.raises(ModelError, match=r"unknown part 'tail'.*decoder-head"):
        autoencoder.select_trainable("tail")  # pyright: ignore[reportArgumentType]
