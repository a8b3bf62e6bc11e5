from __future__ import annotations

import pickle
import shutil

import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch.utils.data import DataLoader

from latentae import AutoencoderKL
from latentae.encoding.latents import LatentDataset
from latentae.errors import OutputError, ShardError


def test_items_are_what_was_stored(encoded, read_tar):
    dataset = LatentDataset(encoded)
    stored = {}
    for shard in sorted(encoded.glob("*.tar")):
        stored |= {
            n.removesuffix(".latent.safetensors"): load_safetensors(d)
            for n, d in read_tar(shard).items()
            if n.endswith(".safetensors")
        }
    assert dataset.keys == list(stored)
    assert len(dataset) == 12
    for index in (11, 0, 5, -1):  # any order
        key, mean, logvar = dataset[index]
        assert torch.equal(mean, stored[key]["mean"])
        assert torch.equal(logvar, stored[key]["logvar"])


def test_samples_are_drawn_from_the_posterior_and_repeat_with_a_seed(encoded):
    latent = LatentDataset(encoded)[3]
    one, two = (latent.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    many = torch.stack([latent.sample() for _ in range(4000)])
    std = torch.exp(0.5 * latent.logvar)
    assert ((many.mean(0) - latent.mean).abs() < 6 * std / 4000**0.5).all()
    torch.testing.assert_close(many.std(0), std, rtol=0.1, atol=0)


def test_scaled_latents_have_zero_mean_and_unit_variance(encoded, model):
    dataset, raw = LatentDataset(encoded, scaled=True), LatentDataset(encoded)
    means = torch.stack([item.mean for item in dataset]).double()
    noise = torch.stack([item.logvar for item in dataset]).double().exp()
    assert means.mean().item() == pytest.approx(0, abs=1e-6)
    assert (means.var(correction=0) + noise.mean()).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(dataset.unscale(dataset[4].mean), raw[4].mean, rtol=1e-5, atol=1e-5)
    sample = dataset[4].sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(dataset.unscale(sample), raw[4].sample(torch.Generator().manual_seed(1)), rtol=1e-5, atol=1e-5)
    assert AutoencoderKL.from_pretrained(model).decode(dataset.unscale(sample)[None]).shape == (1, 3, 32, 32)


def test_workers_read_the_same(encoded):
    dataset = pickle.loads(pickle.dumps(LatentDataset(encoded)))  # as spawned workers get it
    alone = [dataset[i] for i in range(len(dataset))]
    loader = DataLoader(dataset, batch_size=5, num_workers=2)
    batches = list(loader)
    assert [key for batch in batches for key in batch.key] == [item.key for item in alone]
    assert torch.equal(torch.cat([batch.mean for batch in batches]), torch.stack([item.mean for item in alone]))
    assert batches[0].sample().shape == (5, 3, 8, 8)


def test_what_is_no_finished_encoding_is_refused(encoded, photos, tmp_path):
    with pytest.raises(OutputError):
        LatentDataset(photos)
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    record = (out / "latentae.json").read_text()
    (out / "latentae.json").write_text(record.replace('"finished": true', '"finished": false'))
    with pytest.raises(OutputError, match="not finished"):
        LatentDataset(out)


@pytest.mark.parametrize("damage", ["short", "header"])
def test_damaged_shard_is_refused(encoded, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    shard = out / "train-000.tar"
    data = bytearray(shard.read_bytes())
    if damage == "short":
        del data[-1024:]
    else:
        data[0:200] = b"\xff" * 200
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=r"train-000\.tar"):
        LatentDataset(out)
