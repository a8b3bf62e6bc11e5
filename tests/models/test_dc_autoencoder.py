"""AutoencoderDC against diffusers' class: outputs, gradients, folders, and its posterior."""

from __future__ import annotations

import copy

import pytest
import torch
from latentae_kernels import use_backend
from small_models import DC, equal, kept_bytes

import latentae
from latentae.errors import ImageError, ModelError
from latentae.inference.pipeline import LatentPipeline
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import HEAD, AutoencoderDC
from latentae.models.dc.blocks import linear_attention
from latentae.models.pretrained import load_model
from latentae.models.tiling import Tiled

diffusers = pytest.importorskip("diffusers")

BASE = {
    **DC,
    "decoder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock"),
    "encoder_layers_per_block": (1, 2, 1),
    "decoder_layers_per_block": (1, 1, 2),
    "decoder_qkv_multiscales": ((), (3, 5), ()),
}
# every choice that a config has, at least once
CONFIGS = {
    "plain": {},
    "sana": {"downsample_block_type": "Conv", "upsample_block_type": "interpolate", "scaling_factor": 0.4},
    "in": {
        "encoder_layers_per_block": (0, 2, 1),
        "decoder_layers_per_block": (0, 1, 2),
        "decoder_norm_types": ("batch_norm", "batch_norm", "rms_norm"),
        "decoder_act_fns": ("relu", "relu", "silu"),
    },
    "empty ends": {
        "encoder_layers_per_block": (0, 2, 0),
        "decoder_layers_per_block": (0, 1, 0),
        "downsample_block_type": "conv",
        "upsample_block_type": "interpolate",
        "decoder_conv_act_fn": "silu",
    },
    "odd widths": {
        "encoder_block_out_channels": (12, 24, 48),
        "decoder_block_out_channels": (20, 40, 80),
        "latent_channels": 8,
        "decoder_act_fns": ("gelu", "mish", "swish"),
        "attention_head_dim": 16,
    },
    "no shortcuts": {
        "encoder_out_shortcut": False,
        "decoder_in_shortcut": False,
        "latent_channels": 3,
        "in_channels": 1,
    },
    "one level": {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)},
    "long lists": {"encoder_block_out_channels": (8, 16), "decoder_block_out_channels": (8, 8)},
}


def randomize(model: torch.nn.Module) -> None:
    """Weights of norms at their default would hide a mix-up."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)
                value.copy_(
                    1 + 0.2 * noise.abs()
                    if name.endswith(("norm.weight", "running_var", "out.weight"))
                    else 0.3 * noise
                )


def pair(dtype: torch.dtype = torch.float32, **changes):
    torch.manual_seed(0)
    values = {**BASE, **changes}
    ours, theirs = (
        AutoencoderDC(AutoencoderDCConfig(**values)).eval(),
        diffusers.AutoencoderDC(**values).eval(),
    )
    randomize(ours)
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def inputs(config: AutoencoderDCConfig, dtype=torch.float32, height: int = 3, width: int = 4):
    f = config.downsampling
    x = torch.rand(2, config.in_channels, height * f, width * f) * 2 - 1
    return x.to(dtype), torch.randn(2, config.latent_channels, height, width).to(dtype)


def outputs(ours, theirs, x, z):
    return (ours.encode(x).mean, theirs.encode(x).latent), (ours.decode(z), theirs.decode(z).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_outputs_and_gradients_equal_diffusers(name):
    """To fp32, in which diffusers computes statistics and attention; ours stays in fp64."""
    for dtype, size in ((torch.float64, (1, 2)), (torch.float32, (3, 4))):
        ours, theirs = pair(dtype, **CONFIGS[name])
        x, z = inputs(ours.config, dtype, *size)
        for found, expected in outputs(ours, theirs, x, z):
            assert found.dtype == expected.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    losses = (
        ours(x, sample_posterior=False).reconstruction.square().mean(),
        theirs(x).sample.square().mean(),
    )
    grads = [
        torch.autograd.grad(loss, list(m.parameters()))
        for loss, m in zip(losses, (ours, theirs), strict=True)
    ]
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=1e-3, atol=1e-4 * max(1.0, expected.abs().max().item())
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bf16_is_no_further_from_fp64_than_diffusers(backend):
    exact, _ = pair(torch.float64)
    ours, theirs = pair(torch.bfloat16)
    exact.load_state_dict({key: value.double() for key, value in ours.state_dict().items()})
    x, z = inputs(ours.config, torch.bfloat16)
    with use_backend(backend), torch.no_grad():
        found = outputs(ours, theirs, x, z)
    truth = exact.encode(x.double()).mean, exact.decode(z.double())
    for (a, b), want in zip(
        found, truth, strict=True
    ):  # 96 latent values: chance moves a ratio of norms by 0.1
        assert (a.double() - want).norm() <= 1.5 * (b.double() - want).norm()


def test_autocast_runs_and_is_near_fp32():
    ours, _ = pair()
    x, _ = inputs(ours.config)
    expected = ours(x, sample_posterior=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(x, sample_posterior=False)
        found.reconstruction.float().square().mean().backward()
    assert found.posterior.mean.dtype == torch.float32
    assert (
        found.reconstruction.float() - expected.reconstruction
    ).norm() < 0.05 * expected.reconstruction.norm()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("training", [False, True])
def test_the_kernels_give_the_same(training):
    ours, _ = pair(torch.float64, decoder_conv_act_fn="silu")
    x, _ = inputs(ours.config, torch.float64, 1, 2)
    results = []
    for backend in ("torch", "triton"):
        with use_backend(backend), torch.set_grad_enabled(training):
            loss = ours(x, sample_posterior=False).reconstruction.square().mean()
            results.append([loss, *(torch.autograd.grad(loss, list(ours.parameters())) if training else ())])
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["plain", "in"])
def test_a_folder_saved_by_either_loads_in_the_other(name, tmp_path):
    ours, theirs = pair(**CONFIGS[name])
    x, _ = inputs(ours.config)
    expected = ours(x, sample_posterior=False).reconstruction

    ours.save_pretrained(tmp_path / "ours")
    loaded, info = diffusers.AutoencoderDC.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(loaded(x).sample, expected, rtol=1e-5, atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    for back in (AutoencoderDC.from_pretrained(tmp_path / "theirs"), load_model(tmp_path / "theirs")[0]):
        assert isinstance(back, AutoencoderDC)
        assert not back.training
        assert equal(back, ours)
    assert {k: v for k, v in back.config.diffusers_dict().items() if k[0] != "_"} == {
        k: v for k, v in ours.config.diffusers_dict().items() if k[0] != "_"
    }


def test_it_is_public_and_no_other_class(tmp_path):
    assert latentae.AutoencoderDC is AutoencoderDC
    assert latentae.AutoencoderDCConfig is AutoencoderDCConfig
    pair()[0].save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is a AutoencoderDC, not a AutoencoderKL"):
        latentae.AutoencoderKL.from_pretrained(tmp_path)


def test_a_deterministic_models_posterior_is_a_point_and_another_starts_with_one_spread_and_learns_it():
    ours, _ = pair()
    posterior = ours.encode(inputs(ours.config)[0])
    assert (posterior.logvar == -30).all()
    torch.testing.assert_close(posterior.sample(), posterior.mode(), rtol=0, atol=1e-5)
    model = AutoencoderDC(AutoencoderDCConfig(**BASE, bottleneck="gaussian"))
    assert {k for k in model.state_dict() if k.startswith(HEAD)} == {f"{HEAD}weight", f"{HEAD}bias"}
    x, z = inputs(model.config)
    out = model(x, noise=z)
    assert (out.posterior.logvar == 0).all()
    torch.testing.assert_close(out.latent, out.posterior.mean + z)
    (out.reconstruction.square().mean() + out.posterior.kl().mean() * 1e-3).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.encoder.conv_out_logvar.weight.grad.abs().max() > 0


def test_without_its_posterior_a_model_is_diffusers_own(tmp_path):
    model = AutoencoderDC(AutoencoderDCConfig(**BASE, bottleneck="gaussian")).eval()
    plain = model.without_posterior()
    assert plain.config.bottleneck == "deterministic"
    assert model.config.bottleneck == "gaussian"
    assert not plain.training
    assert plain.encoder.conv_in.weight is model.encoder.conv_in.weight
    theirs = diffusers.AutoencoderDC(**BASE)
    theirs.load_state_dict(plain.state_dict())
    x, _ = inputs(model.config)
    torch.testing.assert_close(plain.encode(x).mean, model.encode(x).mean)
    torch.testing.assert_close(theirs.encode(x).latent, model.encode(x).mean, rtol=1e-4, atol=1e-4)
    assert plain.without_posterior() is plain
    # our own folder keeps the head
    model.save_pretrained(tmp_path)
    back = AutoencoderDC.from_pretrained(tmp_path)
    assert back.config.bottleneck == "gaussian"
    assert torch.equal(back.encode(x).logvar, model.encode(x).logvar)


def test_a_head_is_taken_over_made_or_dropped():
    gaussian = AutoencoderDC(AutoencoderDCConfig(**BASE, bottleneck="gaussian"))
    plain = AutoencoderDC(AutoencoderDCConfig(**BASE))
    torch.nn.init.ones_(gaussian.encoder.conv_out_logvar.bias)
    gaussian.load_state_dict(gaussian.with_own_head(plain.state_dict()))
    assert torch.equal(gaussian.encoder.conv_in.weight, plain.encoder.conv_in.weight)
    assert (gaussian.encoder.conv_out_logvar.bias == 1).all()
    plain.load_state_dict(plain.with_own_head(gaussian.state_dict()))
    other = AutoencoderDC(AutoencoderDCConfig(**BASE, bottleneck="gaussian"))
    other.load_state_dict(other.with_own_head(gaussian.state_dict()))
    assert (other.encoder.conv_out_logvar.bias == 1).all()


@pytest.mark.parametrize(
    ("name", "bottleneck"), [("plain", "gaussian"), ("in", "deterministic"), ("empty ends", "gaussian")]
)
def test_checkpointing_changes_neither_outputs_nor_gradients_nor_statistics(name, bottleneck):
    model = (
        AutoencoderDC(AutoencoderDCConfig(**{**BASE, **CONFIGS[name]}, bottleneck=bottleneck))
        .double()
        .train()
    )
    randomize(model)
    x, z = inputs(model.config, torch.float64)
    before, results = copy.deepcopy(model.state_dict()), []
    for model.gradient_checkpointing in (False, True):
        out = model(x, noise=z, keep_features=True)
        loss = out.reconstruction.square().mean() + 1e-3 * out.posterior.kl().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        results.append([out.reconstruction, out.decoder_features, out.encoder_features, *grads])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_checkpointing_keeps_less():
    model, x = AutoencoderDC(AutoencoderDCConfig(**BASE)), torch.randn(1, 3, 64, 64)
    kept = []
    for model.gradient_checkpointing in (False, True):
        kept.append(kept_bytes(model, lambda: model(x)))
    assert kept[1] < 0.35 * kept[0]


def test_batch_normalization_is_frozen_in_training():
    ours, theirs = pair(**CONFIGS["in"])
    x, _ = inputs(ours.config)
    expected = theirs(x).sample
    for model in (ours.train(), ours.eval()):
        torch.testing.assert_close(
            model(x, sample_posterior=False).reconstruction, expected, rtol=1e-4, atol=1e-4
        )


def test_linear_attention_is_attention():
    """Against the definition: weights relu(q) . relu(k_j), normalised over j."""
    qkv = torch.randn(2, 3 * 2 * 4, 3, 5, dtype=torch.float64)
    found = linear_attention(qkv, 4)
    heads = qkv.flatten(2).unflatten(1, (2, 12))  # [B, heads, 12, HW]
    q, k, v = heads.chunk(3, dim=2)
    scores = torch.einsum("bhdi,bhdj->bhij", q.relu(), k.relu())
    mixed = torch.einsum("bhij,bhdj->bhdi", scores / scores.sum(-1, keepdim=True).clamp(min=1e-15), v)
    torch.testing.assert_close(
        found, mixed.flatten(1, 2).unflatten(2, (3, 5)).movedim(1, -1), rtol=1e-10, atol=1e-12
    )
    assert linear_attention(-qkv.abs(), 4).abs().max() == 0  # no key answers any query


def test_a_pipeline_scales_by_the_factor_alone_and_wrong_shapes_and_tiling_are_refused():
    model, _ = pair(scaling_factor=0.5)
    with pytest.raises(ImageError, match="multiples of 4"):
        model.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ModelError, match="expected \\[B, 4, h, w\\]"):
        model.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ModelError, match="tiling takes an AutoencoderKL, this is a AutoencoderDC"):
        Tiled(model)  # pyright: ignore[reportArgumentType]
    images = torch.rand(2, 3, 24, 20) * 2 - 1
    latents = LatentPipeline(model).encode(images)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(list(latents.tensors)), model.encode(images).mode() * 0.5)
    decoded = LatentPipeline(model).decode(latents, output="tensor")
    assert decoded[0].shape == (3, 24, 20)
