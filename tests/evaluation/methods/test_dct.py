"""Block DCT: compared with scipy's transform, and never better than PCA on its images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pillow_files import channels_of
from torch import Tensor

from latentae.errors import DataError, ImageError
from latentae.evaluation.methods.dct import BlockDCT, DctVariances, fit_dct
from latentae.evaluation.methods.method import Method, PatchMethod
from latentae.models.pca import fit_pca

COLORS = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def coefficients(images: Tensor, block: int) -> np.ndarray:
    """Coefficients by scipy: [blocks, C, block, block], colors rotated if there are three."""
    fft = pytest.importorskip("scipy.fft")
    count, channels, height, width = images.shape
    grid = images.double().numpy().reshape(count, channels, height // block, block, width // block, block)
    blocks = grid.transpose(0, 2, 4, 1, 3, 5).reshape(-1, channels, block, block)
    if channels >= 3:
        blocks = np.concatenate([np.einsum("kc,nchw->nkhw", COLORS, blocks[:, :3]), blocks[:, 3:]], axis=1)
    return fft.dctn(blocks, axes=(2, 3), norm="ortho")


def training_error(basis: Tensor, mean: Tensor, images: Tensor, block: int) -> float:
    tokens = (
        torch.nn.functional.unfold(images.double(), block, stride=block).transpose(1, 2).flatten(0, 1) - mean
    )
    return float((tokens - tokens @ basis @ basis.T).square().sum(1).mean())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([1, 3, 4]), st.sampled_from([1, 2, 4, 8]), st.integers(1, 20), st.integers(0, 3))
def test_the_coefficients_of_largest_variance_are_kept(
    smooth_images, channels: int, block: int, kept: int, seed: int
):
    images = channels_of(smooth_images(6, 16, seed), channels)
    kept = min(kept, channels * block**2)
    dct = fit_dct(images, block, kept)
    theirs = coefficients(images, block)
    variances = theirs.var(axis=0).flatten()
    assert dct.variances.numpy() == pytest.approx(np.sort(variances)[::-1][:kept], rel=1e-6, abs=1e-7)
    assert dct.patches == len(theirs)
    torch.testing.assert_close(dct.basis.T @ dct.basis, torch.eye(kept).double(), rtol=0, atol=1e-12)
    error = training_error(dct.basis, dct.mean, images, block)
    assert error == pytest.approx(np.sort(variances)[::-1][kept:].sum(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_components_are_scipys_coefficients_about_their_mean(smooth_images, channels: int):
    images, block = channels_of(smooth_images(4, 16), channels), 4
    theirs = coefficients(images, block)
    dct = fit_dct(images, block, channels * block**2)
    order = np.argsort(-theirs.var(axis=0).flatten(), kind="stable")
    ours = dct.encode(images).permute(0, 2, 3, 1).flatten(0, 2).numpy()
    expected = (theirs - theirs.mean(axis=0)).reshape(len(theirs), -1)[:, order]
    assert np.abs(ours - expected).max() < 1e-8
    assert torch.equal(dct.reconstruct(images), images)


def test_batches_count_as_all_images_do_and_watching_leaves_them_as_they_are(smooth_images):
    images = smooth_images(7, 16)
    whole, parts = fit_dct(images, 4, 9), fit_dct(iter(images.split(3)), 4, 9)
    torch.testing.assert_close(whole.mean, parts.mean, rtol=1e-12, atol=1e-9)
    assert torch.equal(whole.basis, parts.basis)
    variances = DctVariances(4)
    pca = fit_pca(variances.watch(images.split(3)), 4, 9)  # one pass for both
    assert torch.equal(pca.basis, fit_pca(iter(images.split(3)), 4, 9).basis)
    assert torch.equal(variances.best(9).basis, parts.basis)
    assert variances.count == pca.patches
    cut = fit_dct(images, 4, 20).truncated(9)  # a basis that is cut short is the one fitted short
    assert isinstance(cut, BlockDCT)
    assert torch.equal(whole.basis, cut.basis)
    assert torch.equal(whole.reconstruct(images), cut.reconstruct(images))


def test_large_blocks_of_few_images_work(smooth_images):
    images = smooth_images(2, 64)
    dct = fit_dct(images, 64, 128)
    assert dct.basis.shape == (3 * 64 * 64, 128)
    error = (dct.reconstruct(images).double() - images.double()).square().mean()
    flat = (images.double() - images.double().mean(dim=(2, 3), keepdim=True)).square().mean()
    assert error < 0.2 * flat


def test_equal_variances_keep_luma_and_low_frequencies():
    """Rounding would order equal variances differently on each processor."""
    flat = torch.full((2, 3, 8, 8), 200, dtype=torch.uint8)
    dct = fit_dct(flat, 4, 2)
    assert dct.basis[:, 0].tolist() == pytest.approx([1 / 48**0.5] * 48)
    assert torch.equal(dct.reconstruct(flat), flat)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    basis = fit_dct(torch.cat([images, images.transpose(2, 3)]), 8, 64).basis
    frequencies = pytest.importorskip("scipy.fft").dctn(
        basis.T.reshape(64, 8, 8).numpy(), axes=(1, 2), norm="ortho"
    )
    order = np.abs(frequencies).reshape(64, 64).argmax(axis=1).tolist()
    assert all(
        order.index(8 * low + high) < order.index(8 * high + low) for high in range(8) for low in range(high)
    )


def test_what_it_can_not_take_is_refused(smooth_images):
    with pytest.raises(DataError, match="given 0 blocks"):
        fit_dct(iter(()), 4, 2)
    with pytest.raises(ImageError, match="16 x 16, patches of 5"):
        fit_dct(smooth_images(1, 16), 5, 2)
    with pytest.raises(ImageError, match="images have 1 channels, these components are of images with 3"):
        fit_dct(smooth_images(1, 16), 4, 2).reconstruct(smooth_images(1, 16)[:, :1])


def test_pca_and_dct_as_methods_ignore_budgets(smooth_images):
    images = smooth_images(6, 16)
    pca, dct = fit_pca(images, 4, 5), fit_dct(images, 4, 5)
    methods: list[Method] = [PatchMethod("pca", "PCA", pca), PatchMethod("dct", "DCT", dct)]
    for method, basis in zip(methods, (pca, dct), strict=True):
        made = method(images[:2], [0, 0])
        assert torch.equal(made.images, basis.reconstruct(images[:2]))
        assert not made.missing
        assert not made.numbers
    assert [method.name for method in methods] == ["pca", "dct"]
