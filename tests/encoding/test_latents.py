from __future__ import annotations

import gc
import json
import pickle
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from latent_writer import make_samples, write_output
from safetensors.torch import load as load_safetensors
from torch.utils.data import DataLoader

from latentae import AutoencoderKL
from latentae.encoding.latent_dataset import LatentDataset, SizeBatches, decode_latent
from latentae.encoding.sidecar import DIGEST
from latentae.errors import OutputError, ShardError

BUCKETS = ((32, 32), (16, 48), (48, 16))
# webdataset leaves its files to the garbage collector
webdataset_warnings = pytest.mark.filterwarnings(
    "ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def shards(**options):
    return {
        "a/one.tar": make_samples(5, **options),
        "b.tar": [],
        "c.tar": make_samples(1, 5, **options),
        "d.tar": make_samples(9, 6, **options),
    }


@pytest.fixture(scope="module", params=["in the tar", "packed"])
def output(request, tmp_path_factory):
    """Fifteen latents in three sizes, with flips and labels: the folder and what went in."""
    made = shards(buckets=BUCKETS, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("made") / "out"
    return write_output(folder, made, packed=request.param == "packed"), [
        one for name in sorted(made) for one in made[name]
    ]


@pytest.fixture(scope="module", params=["in the tar", "packed"])
def even(request, tmp_path_factory):
    made = shards()
    folder = tmp_path_factory.mktemp("even") / "out"
    return write_output(folder, made, packed=request.param == "packed"), [
        one for name in sorted(made) for one in made[name]
    ]


def test_items_are_what_encode_stored(encoded, kept, read_tar):
    stored = {}
    for shard in sorted(encoded.glob("*.tar")):
        for name, data in read_tar(shard).items():
            if name.endswith(".safetensors"):
                stored[name.removesuffix(".latent.safetensors")] = load_safetensors(data)
    for out in (encoded, kept):  # in the tar, and packed
        dataset = LatentDataset(out)
        assert list(dataset.keys) == list(stored)
        assert len(dataset) == 12
        for index in (11, 0, 5, -1):  # any order
            key, mean, logvar = dataset[index]
            assert torch.equal(mean, stored[key]["mean"])
            assert torch.equal(logvar, stored[key]["logvar"])


def test_packed_or_not_and_in_whatever_type_the_same_is_read(output):
    out, made = output
    dataset = LatentDataset(out)
    assert list(dataset.keys) == [one.key for one in made]
    assert dataset.keys[2:4] == [one.key for one in made[2:4]]
    assert dataset.sizes.tolist() == [list(one.bucket) for one in made]
    assert dataset.labels.tolist() == [one.label for one in made]
    for index in (14, 3, 0, 7):
        assert torch.equal(dataset[index].mean, made[index].tensors["mean"].float())
        assert torch.equal(
            dataset.posterior(index, flip=True).logvar, made[index].tensors["logvar_flip"].float()
        )
        assert dataset[index].mean.dtype == torch.float32
    assert dataset[np.int64(-1)].key == dataset[14].key
    for index in (15, -16):
        with pytest.raises(IndexError):
            dataset[index]
    assert len(list(dataset)) == 15


def test_other_members_of_a_sample(output):
    out, made = output
    dataset = LatentDataset(out)
    for index in (0, 9, -1):
        meta, one = dataset.meta(index), made[index]
        assert meta["__key__"] == one.key
        assert meta["txt"] == one.members["txt"].decode()
        assert {name: meta["latent.json"][name] for name in one.info} == one.info
        assert meta.get("cls", meta.get("json", {}) and meta["json"]["label"]) == one.label
        assert "seg.bin" not in meta
        assert dataset.members(index)["seg.bin"] == one.members["seg.bin"]


def test_samples_are_drawn_from_the_posterior_and_repeat_with_a_seed(encoded):
    latent = LatentDataset(encoded)[3]
    one, two = (latent.sample(torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    many = torch.stack([latent.sample() for _ in range(4000)])
    std = torch.exp(0.5 * latent.logvar)
    assert ((many.mean(0) - latent.mean).abs() < 6 * std / 4000**0.5).all()
    torch.testing.assert_close(many.std(0), std, rtol=0.1, atol=0)


def test_keyed_samples_depend_on_seed_epoch_and_index_alone(even):
    dataset = LatentDataset(even[0], sample=True)
    first = [dataset[i].latent for i in range(15)]
    assert all(torch.equal(LatentDataset(even[0], sample=True)[i].latent, first[i]) for i in (14, 2, 8))
    assert not torch.equal(LatentDataset(even[0], sample=True, seed=1)[2].latent, first[2])
    dataset.set_epoch(1)
    assert not torch.equal(dataset[2].latent, first[2])
    dataset.set_epoch(0)
    assert torch.equal(dataset[2].latent, first[2])
    noise = []
    for epoch in range(400):
        dataset.set_epoch(epoch)
        posterior = dataset.posterior(4)
        noise.append((dataset[4].latent - posterior.mean) / torch.exp(0.5 * posterior.logvar))
    eps = torch.stack(noise)
    assert abs(eps.mean().item()) < 5 / eps.numel() ** 0.5
    assert eps.std().item() == pytest.approx(1, abs=0.02)


def test_flips_are_keyed_and_come_half_of_the_time(even):
    out, made = even
    dataset, flipped = LatentDataset(out, flip=True), 0
    for epoch in range(40):
        dataset.set_epoch(epoch)
        for index in range(15):
            mean = dataset[index].mean
            mirrored = torch.equal(mean, made[index].tensors["mean_flip"])
            assert mirrored or torch.equal(mean, made[index].tensors["mean"])
            flipped += mirrored
    assert 230 < flipped < 370  # of 600, 5.7 standard deviations


def test_what_is_not_stored_can_not_be_had(tmp_path):
    out = write_output(tmp_path / "out", {"a.tar": make_samples(2, flip=False)})
    with pytest.raises(OutputError, match="--flip"):
        LatentDataset(out, flip=True)
    assert not LatentDataset(out).flips
    empty = write_output(tmp_path / "empty", {"a.tar": []})
    assert len(LatentDataset(empty)) == 0
    with pytest.raises(OutputError, match="are constant"):
        LatentDataset(empty, scaled=True)


def test_scaled_latents_have_zero_mean_and_unit_variance(encoded, even, model):
    dataset, raw = LatentDataset(encoded, scaled=True), LatentDataset(encoded)
    means = torch.stack([item.mean for item in dataset]).double()
    noise = torch.stack([item.logvar for item in dataset]).double().exp()
    assert means.mean().item() == pytest.approx(0, abs=1e-6)
    assert (means.var(correction=0) + noise.mean()).item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(dataset.unscale(dataset[4].mean), raw[4].mean, rtol=1e-5, atol=1e-5)
    sample = dataset[4].sample(torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        dataset.unscale(sample), raw[4].sample(torch.Generator().manual_seed(1)), rtol=1e-5, atol=1e-5
    )
    assert AutoencoderKL.from_pretrained(model).decode(dataset.unscale(sample)[None]).shape == (1, 3, 32, 32)
    raw, scaled = (LatentDataset(even[0], sample=True, flip=True, scaled=s) for s in (False, True))
    for index in range(15):
        torch.testing.assert_close(scaled[index].latent, raw.scale(raw[index].latent), rtol=1e-5, atol=1e-5)


def double(item):
    return item.key, item.latent * 2


@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_the_same(even, start):
    dataset = pickle.loads(pickle.dumps(LatentDataset(even[0], sample=True, flip=True, transform=double)))
    assert torch.equal(dataset[3][1], 2 * LatentDataset(even[0], sample=True, flip=True)[3].latent)
    loader = DataLoader(
        dataset, batch_size=4, num_workers=2, persistent_workers=True, multiprocessing_context=start
    )
    draws = []
    for epoch in range(2):
        dataset.set_epoch(epoch)  # reaches workers that live on
        batches = list(loader)
        assert [key for keys, _ in batches for key in keys] == list(dataset.keys)
        draws.append(torch.cat([latents for _, latents in batches]))
        assert torch.equal(draws[-1], torch.stack([dataset[i][1] for i in range(15)]))
    assert not torch.equal(*draws)
    batch = next(iter(DataLoader(LatentDataset(even[0], sample=True), batch_size=15)))
    assert batch.label.tolist() == [one.label for one in even[1]]
    assert batch.latent.shape == (15, 4, 4, 4)


def test_no_label_is_minus_one(tmp_path):
    made = make_samples(5, labels=0)
    for one, extension, data in zip(
        made, ("cls", "json", "json", "json"), (b"-1", b'{"label": null}', b"{}", b"[]"), strict=False
    ):
        one.members[extension] = data
    assert LatentDataset(write_output(tmp_path / "out", {"a.tar": made})).labels.tolist() == [-1] * 5


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_no_file_stays_open_for_each_shard(tmp_path):
    out = write_output(tmp_path / "out", {f"{n:03}.tar": make_samples(2, 2 * n) for n in range(100)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    dataset = LatentDataset(out)
    for item in dataset:
        assert item.mean.shape == (4, 4, 4)
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 80


def test_memory_stays_flat(tmp_path):
    """The arrays take some fifty bytes a sample and its key, whatever the number of shards."""
    one = write_output(tmp_path / "one", {"000.tar": make_samples(200)}, packed=True)
    gc.collect()
    tracemalloc.start()
    dataset = LatentDataset(one)
    gc.collect()
    first, _ = tracemalloc.get_traced_memory()
    for _ in range(3):
        for index in range(len(dataset)):
            dataset.posterior(index)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pickle.dumps(dataset)) < 200 * 70 + 10_000
    assert after - first < 50_000


@webdataset_warnings
def test_webdataset_gives_the_same_items(output):
    out, made = output
    dataset = LatentDataset(out, sample=True, flip=True, scaled=True)
    samples = list(dataset.webdataset())
    assert [one["__key__"] for one in samples] == list(dataset.keys)
    for index, one in enumerate(samples):
        assert torch.equal(one["item"].latent, dataset[index].latent)
        assert one["txt"] == made[index].members["txt"]
        assert "latent.safetensors" not in one
    loader = DataLoader(dataset.webdataset(shardshuffle=10), batch_size=None, num_workers=2)
    assert sorted(one["__key__"] for one in loader) == sorted(dataset.keys)


@webdataset_warnings
def test_webdataset_alone_reads_the_tars(tmp_path):
    made = shards()
    out = write_output(tmp_path / "out", made)
    for name in ("a/one.tar", "d.tar"):
        samples = list(webdataset.WebDataset(str(out / name), shardshuffle=False).decode(decode_latent))
        for one, sample in zip(made[name], samples, strict=True):
            assert sample["__key__"] == one.key
            assert torch.equal(sample["latent.safetensors"]["mean"], one.tensors["mean"])
            assert (
                sample["txt"] == one.members["txt"].decode()
            )  # webdataset's own decoders go on for the other members
            assert sample.get("cls", one.label) == one.label


@pytest.mark.parametrize("packed", [False, True])
def test_remote_is_read_as_local(tmp_path, packed):
    import fsspec

    local = write_output(tmp_path / "out", shards(), packed=packed)
    url = f"memory://latents-{packed}"
    fs = fsspec.filesystem("memory")
    fs.put(f"{local}/", f"/latents-{packed}/", recursive=True)
    here, there = (LatentDataset(path, sample=True, flip=True) for path in (local, url))
    assert list(here.keys) == list(there.keys)
    assert here.digest == there.digest
    for index in (0, 14, 6):
        assert torch.equal(here[index].latent, there[index].latent)
        assert here.meta(index) == there.meta(index)


def test_batches_of_one_size(output):
    out, _ = output
    dataset = LatentDataset(out, sample=True)
    batches = SizeBatches(dataset, 2)
    order = list(batches)
    assert len(order) == len(batches) == 6
    assert order == list(batches)
    dataset.set_epoch(1)
    assert order != list(batches)
    everything = SizeBatches(dataset, 2, shuffle=False, drop_last=False)
    assert sorted(index for batch in everything for index in batch) == list(range(15))
    assert len(list(everything)) == len(everything) == 9
    for batch in DataLoader(dataset, batch_sampler=batches):
        assert batch.latent.ndim == 4


def test_what_is_no_finished_encoding_is_refused(encoded, photos, tmp_path):
    with pytest.raises(OutputError):
        LatentDataset(photos)
    out = tmp_path / "out"
    shutil.copytree(encoded, out)
    record = (out / "latentae.json").read_text()
    (out / "latentae.json").write_text(record.replace('"finished": true', '"finished": false'))
    with pytest.raises(OutputError, match="not finished"):
        LatentDataset(out)
    shutil.copytree(encoded, tmp_path / "other")
    (tmp_path / "other" / "statistics.json").unlink()
    with pytest.raises(OutputError, match=r"statistics\.json"):
        LatentDataset(tmp_path / "other")


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


def test_damage_in_a_packed_file_and_under_an_open_data_set_is_refused(tmp_path):
    made = {"a.tar": make_samples(3), "b.tar": make_samples(3, 3)}
    out = write_output(tmp_path / "packed", made, packed=True)
    file = out / "a.latents-32x32.safetensors"
    data = bytearray(file.read_bytes())
    file.write_bytes(data[:8] + b"#" + data[9:])
    with pytest.raises(ShardError, match=r"a\.latents-32x32"):
        LatentDataset(out)
    file.unlink()
    with pytest.raises(ShardError, match=r"a\.tar"):
        LatentDataset(out)
    out = write_output(tmp_path / "out", made)
    dataset = LatentDataset(out)
    data = (out / "a.tar").read_bytes()
    (out / "a.tar").write_bytes(data[512:] + bytes(512))
    with pytest.raises(ShardError, match="changed"):
        dataset[2]


def test_first_format_is_still_read(tmp_path):
    out = write_output(tmp_path / "out", {"a.tar": make_samples(3, flip=False)})
    sidecar = json.loads((out / "a.tar.done.json").read_text())
    new = {"packed", "flip", "batch_sizes", DIGEST}
    assert new <= sidecar.keys()
    old = {key: value for key, value in sidecar.items() if key not in new}
    (out / "a.tar.done.json").write_text(json.dumps({**old, "format_version": 1}))
    assert len(LatentDataset(out)) == 3
