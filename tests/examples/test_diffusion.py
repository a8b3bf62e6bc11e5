from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from latentae import LatentDataset
from latentae.examples.diffusion import LatentTransformer, flow_loss, sample, train


@pytest.fixture
def two_classes(tmp_path, monkeypatch):
    """Makes latents near +2 or -2 by their class."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "encoding"))
    writer = importlib.import_module("latent_writer")

    def write(**options):
        made = writer.make_samples(24, **options)
        for number, one in enumerate(made):
            for name in ("mean", "mean_flip"):
                one.tensors[name] = 2.0 * (2 * (number % 2) - 1) + 0.1 * one.tensors[name] / 3
        return writer.write_output(tmp_path / "latents", {"a.tar": made[:10], "b.tar": made[10:]})

    return write


def small(classes=2):
    torch.manual_seed(0)
    return LatentTransformer(4, classes, width=32, depth=2, heads=2)


def test_a_new_network_says_zero_and_its_loss_is_known():
    z = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(64) % 3 - 1
    model = small()
    assert torch.equal(model(z, torch.rand(64), labels), torch.zeros_like(z))
    assert flow_loss(model, z, labels, torch.Generator().manual_seed(1)).item() == pytest.approx(2, abs=0.1)


def test_patches_keep_their_positions():
    model = small()
    with torch.no_grad():  # the network ignores everything but where a token is, through its positions
        model.velocity.weight.normal_()
    z = torch.zeros(1, 4, 4, 6)
    bumped = z.clone()
    bumped[0, :, 2:4, 4:6] = 5.0
    changed = (
        model(bumped, torch.zeros(1), torch.zeros(1).long()) - model(z, torch.zeros(1), torch.zeros(1).long())
    ).abs() > 1e-6
    assert changed[0, :, 2:4, 4:6].any()
    assert not changed[0, :, :2].any()  # gates are zero, so no token sees another
    assert not changed[0, :, :, :4].any()


def test_the_example_learns_and_samples_by_class(two_classes):
    latents = LatentDataset(two_classes(labels=2), scaled=True, sample=True, flip=True)
    model = small()
    losses = list(train(model, latents, steps=120, batch_size=12, lr=3e-3))
    assert len(losses) == 120
    assert sum(losses[-20:]) / 20 < 0.5 * sum(losses[:5]) / 5
    z = latents.unscale(sample(model, torch.tensor([0, 1, 0, 1]), (4, 4), steps=20))
    assert z.shape == (4, 4, 4, 4)
    assert (z.mean(dim=(1, 2, 3)) * torch.tensor([-1, 1, -1, 1]) > 1).all()
    assert torch.equal(z, latents.unscale(sample(model, torch.tensor([0, 1, 0, 1]), (4, 4), steps=20)))


def test_sizes_in_turn_without_labels_and_with_workers(two_classes):
    folder = two_classes(labels=0, buckets=((32, 32), (16, 48)))
    model = small(classes=0)
    losses = list(
        train(model, LatentDataset(folder, scaled=True, sample=True), steps=5, batch_size=1000, workers=1)
    )
    assert len(losses) == 5
    assert sample(model, torch.tensor([-1]), (2, 6), steps=2).shape == (1, 4, 2, 6)
