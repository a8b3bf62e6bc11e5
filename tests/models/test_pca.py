"""PCA of patches against numpy, the sketch against PCA, and angles between subspaces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from latentae.errors import DataError, ImageError
from latentae.models.pca import fit_pca, principal_angles, sketch_pca


def smooth_images(count: int, size: int, seed: int = 0) -> Tensor:
    """Color gradients with a little noise, as compressible as photos: uint8 [N, 3, size, size]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    noise = 0.03 * torch.randn(count, 3, size, size, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def photo_tiles(size: int) -> Tensor:
    """Tiles of two photos by brightness, the worst order for a sketch: uint8 [N, 3, size, size]."""
    data = pytest.importorskip("skimage.data")
    tiles = []
    for photo in (data.astronaut(), data.chelsea()):
        image = torch.from_numpy(photo).permute(2, 0, 1)
        grid = image.unfold(1, size, size // 2).unfold(2, size, size // 2)
        tiles.append(grid.permute(1, 2, 0, 3, 4).flatten(0, 1))
    found = torch.cat(tiles)
    return found[found.double().mean((1, 2, 3)).argsort()].contiguous()


def tokens_of(images: Tensor, patch: int) -> Tensor:
    return torch.nn.functional.unfold(images.double(), patch, stride=patch).transpose(1, 2).flatten(0, 1)


def psnr(tokens: Tensor, mean: Tensor, basis: Tensor) -> float:
    centred = tokens - mean
    error = (centred - centred @ basis @ basis.T).square().mean()
    return float(10 * (255**2 / error).log10())


@pytest.mark.parametrize("fit", [fit_pca, sketch_pca])
def test_pca_of_batches_is_the_pca_of_all(fit):
    images = smooth_images(10, 16)
    whole, parts = fit(images, 4, 5), fit(iter(images.split(3)), 4, 5)
    assert whole.patches == parts.patches == 160
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(whole.variances, parts.variances, rtol=1e-9, atol=1e-9)
    assert principal_angles(whole.basis, parts.basis).max() < 1e-6


def test_full_rank_pca_is_exact_and_a_truncated_one_gets_better_with_components():
    images = smooth_images(12, 16)
    assert torch.equal(fit_pca(images, 4, 48).reconstruct(images), images)
    assert torch.equal(fit_pca(images, 4, 99).reconstruct(images), images)
    errors = [
        (fit_pca(images, 4, k).reconstruct(images).float() - images.float()).square().mean()
        for k in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2] > 0


def test_a_sketch_that_holds_everything_is_the_closed_form_and_the_same_every_time():
    images = smooth_images(40, 16)
    exact, sketch = (
        fit_pca(images, 2, 6),
        sketch_pca(images, 2, 6),
    )  # it carries 28 directions, a patch has 12 numbers
    torch.testing.assert_close(sketch.mean, exact.mean, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(sketch.variances, exact.variances, rtol=1e-9, atol=1e-7)
    assert principal_angles(sketch.basis, exact.basis).max() < 1e-5
    torch.testing.assert_close(sketch_pca(images, 2, 6).basis, sketch.basis, rtol=0, atol=1e-12)


def test_a_sketch_of_photos_loses_nothing_to_see_even_in_the_worst_order():
    images, patch, components = photo_tiles(32), 8, 12
    exact, sketch = fit_pca(images, patch, components), sketch_pca(images.split(50), patch, components)
    tokens = tokens_of(images, patch)
    torch.testing.assert_close(sketch.mean, exact.mean, rtol=1e-12, atol=1e-9)
    assert 0 <= psnr(tokens, exact.mean, exact.basis) - psnr(tokens, sketch.mean, sketch.basis) < 0.01
    torch.testing.assert_close(
        sketch.basis.T @ sketch.basis, torch.eye(components).double(), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(sketch.variances, exact.variances, rtol=0.01, atol=0)


def test_a_sketch_of_large_patches_finds_the_directions_that_are_there():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.linalg.qr(torch.randn(3 * 64 * 64, 4, generator=generator))[0] * torch.tensor(
        [9e3, 6e3, 4e3, 2.5e3]
    )
    images = (
        127.5
        + torch.randn(200, 4, generator=generator) @ patterns.T
        + torch.randn(200, 3 * 64 * 64, generator=generator)
    )
    images = images.round().clamp(0, 255).to(torch.uint8).reshape(-1, 3, 64, 64)
    pca = sketch_pca(images.split(64), 64, 4)
    assert pca.basis.shape == (3 * 64 * 64, 4)
    tokens = images.flatten(1).double()
    theirs = torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][:4].T
    assert principal_angles(pca.basis, theirs).max() < 0.1


@pytest.mark.parametrize("fit", [fit_pca, sketch_pca])
def test_signs_of_components_do_not_follow_those_of_lapack(monkeypatch, fit):
    images, eigh, svd = smooth_images(10, 16), torch.linalg.eigh, torch.linalg.svd
    expected = fit(images, 4, 5).basis

    def other_eigh(matrix):
        values, vectors = eigh(matrix)
        return torch.return_types.linalg_eigh((values, -vectors))

    def other_svd(matrix, full_matrices):
        u, s, vh = svd(matrix, full_matrices=full_matrices)
        return -u, s, -vh

    monkeypatch.setattr(torch.linalg, "eigh", other_eigh)
    monkeypatch.setattr(torch.linalg, "svd", other_svd)
    assert torch.equal(fit(images, 4, 5).basis, expected)


def test_pca_of_too_few_patches_is_refused():
    with pytest.raises(DataError, match=r"PCA has 32 patches, it needs at least 48 patches of 4 x 4"):
        fit_pca(smooth_images(2, 16), 4, 8)
    with pytest.raises(DataError, match=r"PCA has 32 patches, it needs at least 160 patches of 4 x 4"):
        sketch_pca(smooth_images(2, 16), 4, 8)
    for fit in (fit_pca, sketch_pca):
        with pytest.raises(DataError, match="0 patches, it needs any"):
            fit(iter(()), 4, 8)
        with pytest.raises(ImageError, match="16 x 16, patches of 5"):
            fit(smooth_images(2, 16), 5, 8)


@pytest.mark.parametrize("degrees", [0.0, 1e-7, 0.5, 44.0, 46.0, 90.0])
def test_principal_angles_of_planes_turned_by_a_known_angle(degrees: float):
    turn = torch.tensor(degrees).double().deg2rad()
    a = torch.eye(5, dtype=torch.float64)[:, :2]
    b = a.clone()
    b[:, 1] = turn.cos() * a[:, 1] + turn.sin() * torch.eye(5, dtype=torch.float64)[:, 3]
    mixed = b @ torch.tensor([[2.0, 1.0], [0.0, -3.0]]).double()  # other columns, the same plane
    found = principal_angles(a, mixed)
    assert found.tolist() == pytest.approx([0, degrees], rel=1e-6, abs=1e-12)
    assert principal_angles(mixed[:, :1], a).tolist() == pytest.approx([0], abs=1e-7)  # a line in the plane


@pytest.mark.parametrize(("fit", "channels"), [(fit_pca, 1), (fit_pca, 3), (sketch_pca, 3), (sketch_pca, 4)])
def test_gray_colour_and_alpha_are_all_projected_as_numpy_would(fit, channels: int):
    images = torch.cat([smooth_images(16, 24), smooth_images(16, 24, seed=1)], 1)[:, :channels, :16]
    pca = fit(images, 4, 5)
    assert (pca.channels, pca.components, pca.patches) == (channels, 5, 16 * 4 * 6)
    assert pca.basis.shape == (channels * 16, 5)
    grid = images.double().numpy().reshape(16, channels, 4, 4, 6, 4).transpose(0, 2, 4, 1, 3, 5)
    tokens = grid.reshape(-1, channels * 16)
    vectors = np.linalg.svd(tokens - tokens.mean(0), full_matrices=False)[2][:5]
    exact = tokens.mean(0) + (tokens - tokens.mean(0)) @ vectors.T @ vectors
    plain = (
        exact.reshape(16, 4, 6, channels, 4, 4)
        .transpose(0, 3, 1, 4, 2, 5)
        .reshape(images.shape)
        .round()
        .clip(0, 255)
    )
    difference = np.abs(pca.reconstruct(images).double().numpy() - plain)
    assert difference.max() <= (
        1 if fit is fit_pca else 4
    )  # a value may round the other way; a sketch leaves a little out
    assert difference.mean() < (1e-3 if fit is fit_pca else 0.2)


def test_components_are_images_of_their_own_and_can_be_cut_short():
    images = smooth_images(12, 16)
    pca = fit_pca(images, 4, 9)
    components = pca.encode(images)
    assert components.shape == (12, 9, 4, 4)
    token = tokens_of(images, 4)[6]  # the first image, second row, third column
    torch.testing.assert_close(components[0, :, 1, 2], (token - pca.mean) @ pca.basis, rtol=0, atol=1e-9)
    torch.testing.assert_close(components.square().mean((0, 2, 3)), pca.variances, rtol=1e-9, atol=1e-9)
    assert torch.equal(pca.decode(components), pca.reconstruct(images))
    short = pca.truncated(4)
    assert (type(short), short.components) == (type(pca), 4)
    assert torch.equal(
        short.reconstruct(images), pca.decode(torch.cat([components[:, :4], 0 * components[:, 4:]], 1))
    )
    assert torch.equal(short.reconstruct(images), fit_pca(images, 4, 4).reconstruct(images))
    with pytest.raises(ImageError, match="images have 1 channels, these components are of images with 3"):
        pca.reconstruct(images[:, :1])
