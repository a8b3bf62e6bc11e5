from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.data.decode import decode_sample
from latentae.data.loader import Batch, TrainLoader, image_batches, is_held_out
from latentae.data.options import DataOptions
from latentae.data.shards import expand_shards
from latentae.errors import DataError, ImageError, ShardError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("shards"), [7, 1, 0, 12])


def options(folder, **rest) -> DataOptions:
    return DataOptions(**{"shards": str(folder), "resolution": 8, "validation": "none", "shuffle_buffer": 5, **rest})


def take(loader: TrainLoader, count: int) -> list[Batch]:
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    iterator.close()  # type: ignore[attr-defined]
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return [x.keys for x in a] == [y.keys for y in b] and all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))


def test_a_batch_is_uint8_channels_last(folder):
    (batch,) = take(TrainLoader(options(folder), 4, 0), 1)
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert len(batch.keys) == 4


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(lambda counts: sum(counts) >= 4),
    st.integers(1, 4),
    st.integers(1, 8),
)
@settings(max_examples=12, deadline=None)
def test_every_sample_comes_once_per_epoch_over_all_ranks(tmp_path_factory, make_shards, counts, world_size, buffer):
    folder = make_shards(tmp_path_factory.mktemp("worlds"), counts)
    everything = Counter(f"s{shard}/{number:03}" for shard, count in enumerate(counts) for number in range(count))
    total, epochs = sum(counts), [Counter(), Counter()]
    for rank in range(world_size):
        share = (rank + 1) * total // world_size - rank * total // world_size
        keys = [
            key
            for batch in take(TrainLoader(options(folder, shuffle_buffer=buffer), 1, 3, rank, world_size), 2 * share)
            for key in batch.keys
        ]
        epochs[0].update(keys[:share])
        epochs[1].update(keys[share:])
    assert epochs == [everything, everything]


def test_every_sample_comes_once_per_epoch_over_workers(folder):
    batches = take(TrainLoader(options(folder, workers=2), 1, 0), 40)
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys[:20])) == len(set(keys[20:])) == 20
    assert keys[:20] != keys[20:]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_and_the_pixels_depend_on_the_seed_alone(folder, workers):
    settings = options(folder, workers=workers, scale_min=0)
    first = take(TrainLoader(settings, 3, 1), 9)
    assert same(first, take(TrainLoader(settings.model_copy(update={"cache_mb": 0}), 3, 1), 9))
    assert not same(first, take(TrainLoader(settings, 3, 2), 9))


def test_an_image_is_cropped_anew_in_each_epoch(folder):
    crops: dict[str, list[torch.Tensor]] = {}
    for batch in take(TrainLoader(options(folder, scale_min=0), 4, 0), 10):
        for key, image in zip(batch.keys, batch.images, strict=True):
            crops.setdefault(key, []).append(image)
    assert all(len(two) == 2 for two in crops.values())
    assert sum(not torch.equal(*two) for two in crops.values()) >= 18


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 4, 13])
def test_a_saved_state_goes_on_exactly(folder, workers, stop):
    settings = options(folder, workers=workers)
    whole = take(TrainLoader(settings, 3, 1), 18)
    first = TrainLoader(settings, 3, 1)
    assert same(take(first, stop), whole[:stop])
    state = json.loads(json.dumps(first.state_dict()))
    assert state["batches"] == stop  # not what workers made in advance
    second = TrainLoader(settings, 3, 1)
    second.load_state_dict(state)
    assert same(take(second, 18 - stop), whole[stop:])
    assert second.epoch == 18 * 3 // 20
    assert same(take(first, 18 - stop), whole[stop:])  # so does the loader itself


@pytest.mark.parametrize(
    ("changed", "arguments", "says"),
    [
        ({}, (3, 2, 0, 1), "seed"),
        ({}, (4, 1, 0, 1), "batch_size"),
        ({}, (3, 1, 1, 2), "world_size"),
        ({"workers": 1}, (3, 1, 0, 1), "workers"),
        ({"validation": "auto", "validation_fraction": 0.3}, (3, 1, 0, 1), "samples"),
    ],
)
def test_a_state_of_another_run_is_refused(folder, changed, arguments, says):
    state = TrainLoader(options(folder), 3, 1).state_dict()
    with pytest.raises(DataError, match=says):
        TrainLoader(options(folder, **changed), *arguments).load_state_dict(state)


def test_a_state_of_other_data_or_a_damaged_one_is_refused(folder, tmp_path, make_shards):
    loader = TrainLoader(options(folder), 3, 1)
    with pytest.raises(DataError, match="digest"):
        loader.load_state_dict(TrainLoader(options(make_shards(tmp_path, [9])), 3, 1).state_dict())
    for broken in ({}, {**loader.state_dict(), "batches": None}, {**loader.state_dict(), "format_version": 99}):
        with pytest.raises(DataError, match="resume"):
            loader.load_state_dict(broken)


def test_the_held_out_slice_is_disjoint_and_complete(folder):
    settings = options(folder, validation="auto", validation_fraction=0.3)
    loader = TrainLoader(settings, 2, 0)
    trained = {key for batch in take(loader, loader.samples) for key in batch.keys}
    shards = expand_shards(folder)
    held_out = {key for batch in image_batches(shards, 8, 4, only_held_out=0.3) for key in batch.keys}
    everything = {key for batch in image_batches(shards, 8, 4) for key in batch.keys}
    assert held_out
    assert not trained & held_out
    assert trained | held_out == everything
    assert (loader.samples, loader.held_out) == (len(trained), len(held_out))
    assert all(is_held_out(key, 0.3) for key in held_out)


def test_the_held_out_fraction_is_kept_and_grows_by_inclusion():
    keys = [f"a/{number}" for number in range(5000)]
    small, large = ({key for key in keys if is_held_out(key, fraction)} for fraction in (0.02, 0.1))
    assert 60 < len(small) < 145
    assert small < large
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert all(is_held_out(key, 1.0) for key in keys)


def test_evaluation_batches_come_in_order_once(folder):
    shards = expand_shards(folder)
    batches = list(image_batches(shards, 8, 6))
    assert [len(batch.keys) for batch in batches] == [6, 6, 6, 2]
    keys = [key for batch in batches for key in batch.keys]
    assert keys == sorted(keys)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)
    limited = list(image_batches(shards, 8, 6, limit=8))
    assert [len(batch.keys) for batch in limited] == [6, 2]
    assert [key for batch in limited for key in batch.keys] == keys[:8]
    assert list(image_batches(shards, 8, 6, limit=0)) == []


@pytest.mark.parametrize(
    ("rest", "arguments", "says"),
    [
        ({}, (21, 0), "found 20 training images .*takes 21"),
        ({}, (6, 0, 0, 4), "takes 24"),
        ({"workers": 11}, (1, 0, 0, 2), "22 workers"),
        ({"validation": "auto", "validation_fraction": 0.999}, (1, 0), "held out"),
        ({"shards": None}, (1, 0), "data.shards"),
        ({}, (0, 0), "batch size 0"),
    ],
)
def test_too_few_images_are_an_error_before_training_starts(folder, rest, arguments, says):
    settings = options(folder, **rest) if "shards" not in rest else DataOptions()
    with pytest.raises(DataError, match=says):
        TrainLoader(settings, *arguments)


def test_validation_shards_must_not_be_trained_on(folder, tmp_path, make_shards):
    with pytest.raises(DataError, match="keep them apart"):
        TrainLoader(options(folder, validation=f"{folder}/003.tar"), 1, 0)
    with pytest.raises(ShardError, match="no shard"):
        TrainLoader(options(folder, validation=f"{tmp_path}/missing.tar"), 1, 0)
    assert TrainLoader(options(folder, validation=make_shards(tmp_path, [2])), 1, 0).samples == 20


def bad_shards(folder: Path, write_tar, make_png) -> str:
    write_tar(folder / "bad.tar", [("good.png", make_png(1)), ("page.jpg", b"<html>not found</html>")])
    return str(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_names_its_key_and_shard_in_one_line(tmp_path, write_tar, make_png, workers):
    loader = TrainLoader(options(bad_shards(tmp_path, write_tar, make_png), workers=workers), 2, 0)
    with pytest.raises(ImageError, match=r"page in .*bad\.tar") as caught:
        take(loader, 1)
    assert "\n" not in str(caught.value)


def test_a_shard_that_changes_under_way_is_an_error(tmp_path, make_shards, write_tar):
    folder = make_shards(tmp_path, [4])
    loader = TrainLoader(options(folder), 2, 0)
    write_tar(tmp_path / "000.tar", [("a.png", b"")])
    with pytest.raises(ShardError, match="has changed"):
        take(loader, 1)


def test_workers_end_with_the_iteration(folder):
    iterator = iter(TrainLoader(options(folder, workers=2), 3, 0))
    next(iterator)
    assert len(multiprocessing.active_children()) == 2
    iterator.close()  # type: ignore[attr-defined]
    gc.collect()
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_an_error_of_ours(folder, monkeypatch):
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("the worker does not inherit the fault")
    monkeypatch.setattr("latentae.data.loader.decode_sample", lambda raw: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(DataError, match="worker died"):
        take(TrainLoader(options(folder, workers=1), 3, 0), 1)


def test_decoded_images_are_kept_up_to_a_limit_of_memory(tmp_path, write_tar, make_png, monkeypatch):
    decoded: list[str] = []
    monkeypatch.setattr("latentae.data.loader.decode_sample", lambda raw: decoded.append(raw["__key__"]) or decode_sample(raw))
    write_tar(tmp_path / "a.tar", [(f"{number}.png", make_png(number, 500, 500)) for number in range(3)])  # 0.75 MB each
    for megabytes, expected in ((0, 9), (1, 3 + 2 + 2), (3, 3)):
        decoded.clear()
        take(TrainLoader(options(tmp_path, cache_mb=megabytes), 3, 0), 3)
        assert len(decoded) == expected
