from __future__ import annotations

import numpy as np
import pytest
import torch

from latentae.losses import alignment
from latentae.losses.alignment import AlignmentLoss, distance_similarity, marginal_cosine
from latentae.losses.options import AlignmentOptions


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def plain_cosine(projected: np.ndarray, features: np.ndarray, margin: float) -> float:
    """Both are one map as vectors, [positions, C]."""
    return float(
        np.mean([max(0, 1 - margin - cosine(a, b)) for a, b in zip(projected, features, strict=True)])
    )


def plain_distance(z: np.ndarray, features: np.ndarray, margin: float) -> float:
    n = range(len(z))
    return float(
        np.mean(
            [
                max(0, abs(cosine(z[i], z[j]) - cosine(features[i], features[j])) - margin)
                for i in n
                for j in n
            ]
        )
    )


def vectors(maps: torch.Tensor) -> np.ndarray:
    return maps.detach().flatten(2).mT.numpy()  # [B, positions, C]


@pytest.mark.parametrize("limit", [2**24, 2 * 15 * 4, 1])
def test_both_halves_equal_the_plain_formulas_in_fp64(limit, monkeypatch):
    monkeypatch.setattr(alignment, "LIMIT", limit)
    z, projected, features = (torch.randn(2, channels, 3, 5, dtype=torch.float64) for channels in (4, 6, 6))
    for loss, plain, given, margin in (
        (marginal_cosine, plain_cosine, projected, 0.5),
        (distance_similarity, plain_distance, z, 0.25),
    ):
        expected = [plain(a, f, margin) for a, f in zip(vectors(given), vectors(features), strict=True)]
        np.testing.assert_allclose(loss(given, features, margin).numpy(), expected, rtol=1e-12)


def test_rows_at_a_time_have_the_same_gradient_and_save_little(monkeypatch):
    z = torch.randn(1, 4, 16, 16, dtype=torch.float64, requires_grad=True)
    features = torch.randn(1, 8, 16, 16, dtype=torch.float64)
    results = []
    for limit in (2**24, 256 * 16):
        monkeypatch.setattr(alignment, "LIMIT", limit)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x
        ):
            value = distance_similarity(z, features, 0.1)
        results.append((value.detach(), torch.autograd.grad(value.sum(), z)[0], max(saved)))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=1e-12, atol=1e-15)
    assert results[0][2] == 256**2
    assert results[1][2] <= 8 * 256, "no similarity matrix waits for the backward pass"


def loss_of(size: int, channels: int = 4) -> tuple[AlignmentLoss, torch.Tensor]:
    options = AlignmentOptions(weight=0.1, backbone="efficientnet-lite0")
    return AlignmentLoss(options, channels), torch.rand(2, 3, size, size) * 2 - 1


def test_the_whole_loss_equals_the_plain_formula():
    loss, images = loss_of(64)
    loss = loss.double()
    images, z = images.double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    features = torch.nn.functional.interpolate(
        loss.backbone.features(images)[0], size=(8, 8), mode="bilinear", antialias=True
    )
    projected = torch.einsum("fc,bchw->bfhw", loss.projection.weight[:, :, 0, 0], z)
    expected = [
        plain_cosine(p, f, 0.5) + plain_distance(a, f, 0.25)
        for a, p, f in zip(vectors(z), vectors(projected), vectors(features), strict=True)
    ]
    np.testing.assert_allclose(loss(z, images).detach().numpy(), expected, rtol=1e-9)


def test_only_the_projection_is_learned_and_saved_and_gradients_stay_finite():
    loss, images = loss_of(32)
    assert list(loss.state_dict()) == ["projection.weight"]
    assert [name for name, _ in loss.named_parameters()] == ["projection.weight"]
    z = torch.randn(2, 4, 4, 4, requires_grad=True)
    images.requires_grad_()
    loss(z, images).sum().backward()
    assert z.grad.abs().max() > 0
    assert loss.projection.weight.grad.abs().max() > 0
    assert images.grad is None, "features are targets"
    empty = torch.zeros(2, 4, 4, 4, requires_grad=True)
    loss(empty, images).sum().backward()
    assert torch.isfinite(empty.grad).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(z.bfloat16(), images).dtype == torch.float32
