"""The linear autoencoder: it is PCA once it has PCA's weights, and becomes PCA by training."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from latentae.errors import ImageError, ModelError
from latentae.models.config import LinearAutoencoderConfig
from latentae.models.linear import LinearAutoencoder
from latentae.models.pca import fit_pca, principal_angles


def digits() -> Tensor:
    """scikit-learn's digits on sheets of 16 x 16; uint8 [7, 1, 128, 128]."""
    images = pytest.importorskip("sklearn.datasets").load_digits().images[: 7 * 256]
    sheets = torch.from_numpy(images).mul(255 / 16).round().to(torch.uint8).reshape(7, 1, 16, 16, 8, 8)
    return sheets.permute(0, 1, 2, 4, 3, 5).reshape(7, 1, 128, 128)


def photos() -> Tensor:
    """Tiles of two photos; uint8 [8, 3, 128, 128]."""
    data = pytest.importorskip("skimage.data")
    tiles = [
        data.astronaut()[y : y + 128, x : x + 128] for y, x in ((0, 128), (128, 256), (256, 128), (384, 384))
    ]
    tiles += [
        data.coffee()[y : y + 128, x : x + 128] for y, x in ((0, 0), (128, 128), (128, 256), (256, 384))
    ]
    return torch.stack([torch.from_numpy(tile).permute(2, 0, 1) for tile in tiles])


def linear(images: Tensor, latent_channels: int, tied: bool, patch: int = 8) -> LinearAutoencoder:
    channels = images.shape[1]
    return LinearAutoencoder(
        LinearAutoencoderConfig(
            in_channels=channels,
            out_channels=channels,
            latent_channels=latent_channels,
            patch=patch,
            tied=tied,
        )
    )


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def train(model: LinearAutoencoder, images: Tensor, steps: int = 500) -> None:
    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.02, betas=(0.9, 0.95)
    )  # 0.999 remembers the first, large gradients
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = (model(images, sample_posterior=False).reconstruction - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("source", "tied"), [(digits, True), (photos, False)])
def test_trained_it_has_pcas_error_and_spans_pcas_subspace(source, tied: bool):
    images, components = source(), 4  # at gaps of the spectra: 1.45 and 2.4
    pca, x = fit_pca(images, 8, components), scaled(images)
    model, best = linear(images, components, tied), linear(images, components, tied)
    best.load_pca(pca)
    before = principal_angles(model.subspace(), pca.basis).max()
    train(model, x)
    with torch.no_grad():
        error, least = (
            (m(x, sample_posterior=False).reconstruction - x).square().mean() for m in (model, best)
        )
    assert 1 - 1e-5 < error / least < 1.01
    assert before > 45
    assert principal_angles(model.subspace(), pca.basis).max() < 2


@pytest.mark.parametrize(("tied", "patch"), [(True, 4), (False, 8)])
def test_with_pcas_weights_it_is_pca(tied: bool, patch: int):
    images = photos()
    pca = fit_pca(images, patch, 6)
    model = linear(images, 6, tied, patch).double()
    model.load_pca(pca)
    x = images.double() / 127.5 - 1
    output = model(x, sample_posterior=False)
    rounded = ((output.reconstruction + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert torch.equal(rounded, pca.reconstruct(images))
    latent = output.latent * 127.5
    torch.testing.assert_close(latent.mean((0, 2, 3)), torch.zeros(6).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(latent.var((0, 2, 3), correction=0), pca.variances, rtol=1e-9, atol=0)
    assert principal_angles(model.subspace(), pca.basis).max() < 1e-6
    with torch.no_grad():
        found = (model.float()(x.float(), sample_posterior=False).reconstruction + 1) * 127.5
    difference = found.round().clamp(0, 255) - pca.reconstruct(images).float()
    assert difference.abs().max() <= 1
    # fp32 errs by at most 1e-3 gray levels in 192 products: under 1 in 500 values round differently
    assert (difference != 0).float().mean() < 2e-3


def test_a_sample_is_the_mean():
    model = linear(photos(), 8, tied=False)
    x = scaled(photos()[:2])
    output = model(x, noise=torch.randn(2, 8, 16, 16))
    assert (output.latent - output.posterior.mode()).abs().max() < 2e-6
    assert (output.posterior.logvar == -30).all()
    assert output.decoded.shape == (2, 8, 16, 16)
    assert output.reconstruction.shape == x.shape
    assert torch.equal(model.decode(model.encode(x).mode()), model(x, sample_posterior=False).reconstruction)


def test_tied_it_learns_one_weight_from_both_ends():
    tied, untied = (linear(photos(), 8, tied=tied) for tied in (True, False))
    assert set(tied.state_dict()) == {"encoder.weight", "encoder.bias", "decoder.bias"}
    assert set(untied.state_dict()) == {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
    untied.load_state_dict(tied.state_dict() | {"decoder.weight": tied.encoder.weight})
    x = scaled(photos()[:2])
    for model in (tied, untied):
        (model(x, sample_posterior=False).reconstruction - x).square().mean().backward()
    both = untied.encoder.weight.grad + untied.decoder.weight.grad
    torch.testing.assert_close(tied.encoder.weight.grad, both, rtol=1e-4, atol=1e-6)


def test_other_channels_out_than_in_and_config_as_plain_json():
    model = LinearAutoencoder(
        LinearAutoencoderConfig(in_channels=4, out_channels=1, latent_channels=5, patch=4, tied=False)
    )
    assert model(torch.rand(2, 4, 8, 12), sample_posterior=False).reconstruction.shape == (2, 1, 8, 12)
    assert model.subspace().shape == (16, 5)
    with pytest.raises(ValidationError, match="set tied = false"):
        LinearAutoencoderConfig(in_channels=4, out_channels=1, tied=True)
    with pytest.raises(ValidationError, match="has 12 numbers; use at most"):
        LinearAutoencoderConfig(patch=2, latent_channels=13)
    config = LinearAutoencoderConfig(latent_channels=12, patch=16, tied=False)
    assert config.downsampling == 16
    values = json.loads(json.dumps(config.diffusers_dict()))
    assert values["_class_name"] == "LinearAutoencoder"
    assert LinearAutoencoderConfig.from_values(values, "config.json") == config


def test_what_does_not_fit_is_refused():
    model = linear(photos(), 8, tied=True)
    with pytest.raises(ModelError, match="fit PCA on the same patch"):
        model.load_pca(fit_pca(photos(), 8, 7))
    with pytest.raises(ModelError, match="4 x 4 patches with 48 numbers"):
        model.load_pca(fit_pca(photos(), 4, 8))
    with pytest.raises(ModelError, match="64 numbers"):
        model.load_pca(fit_pca(digits(), 8, 8))
    with pytest.raises(ImageError, match="multiples of 8"):
        model.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(ModelError, match=r"expected \[B, 8, h, w\]"):
        model.decode(torch.zeros(1, 3, 2, 2))
