from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.data.decode import decode_sample
from latentae.data.loader import Batch, TrainLoader, image_batches
from latentae.data.options import DataOptions
from latentae.data.order import is_held_out
from latentae.data.shard_files import expand_shards
from latentae.data.shards import write_shards
from latentae.data.shrinking import encode_png
from latentae.data.streaming import StreamLoader
from latentae.errors import DataError, ShardError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("shards"), [7, 1, 0, 12])


def options(folder, **rest) -> DataOptions:
    return DataOptions(**{"shards": str(folder), "resolution": 8, "validation": "none", **rest})


def take(loader: TrainLoader, count: int) -> list[Batch]:
    iterator = iter(loader)
    batches = list(itertools.islice(iterator, count))
    iterator.close()  # type: ignore[attr-defined]
    return batches


def same(a: list[Batch], b: list[Batch]) -> bool:
    return [x.keys for x in a] == [y.keys for y in b] and all(
        torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True)
    )


def stream(
    settings: DataOptions, batch: int, world_size: int, start: dict | None, steps: int, seed: int = 3
) -> list[tuple[str, ...]]:
    """The global batches as all ranks together see them."""
    ranks = []
    for rank in range(world_size):
        loader = TrainLoader(settings, batch // world_size, seed, rank, world_size)
        if start is not None:
            loader.load_state_dict(start)
        ranks.append([b.keys for b in take(loader, steps)])
    return [tuple(itertools.chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(lambda counts: sum(counts) >= 6),
    st.sampled_from([1, 2, 3, 6]),
    st.booleans(),
)
@settings(max_examples=8, deadline=None)
def test_every_sample_comes_at_most_once_per_epoch_over_all_ranks(
    tmp_path_factory, make_shards, counts, world_size, pad
):
    folder = make_shards(tmp_path_factory.mktemp("worlds"), counts)
    everything = {f"s{shard}/{number:03}" for shard, count in enumerate(counts) for number in range(count)}
    loader = TrainLoader(options(folder, pad=pad), 6, 3)
    batches = stream(options(folder, pad=pad), 6, world_size, None, 2 * loader.steps)
    for epoch in (batches[: loader.steps], batches[loader.steps :]):
        keys = [key for batch in epoch for key in batch]
        assert set(keys) <= everything
        if pad:
            assert set(keys) == everything
        else:
            assert len(set(keys)) == len(keys) == len(everything) - loader.tail
    assert loader.tail == (0 if pad else len(everything) % 6)


@pytest.fixture(scope="module")
def elastic(tmp_path_factory, make_shards):
    """Options of a set that 12 does not divide, and its first 16 batches of 12: 7 per epoch."""
    settings = options(make_shards(tmp_path_factory.mktemp("elastic"), [37, 5, 0, 50]))
    return settings, stream(settings, 12, 1, None, 16)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("world_size", "workers"), [(1, 4), (2, 1), (3, 2), (6, 0)])
def test_any_number_of_ranks_and_workers_sees_the_same_batches(elastic, world_size, workers):
    settings, whole = elastic
    assert stream(settings.model_copy(update={"workers": workers}), 12, world_size, None, 9) == whole[:9]


@pytest.mark.parametrize("stop", [1, 7, 8])
def test_a_run_goes_on_at_another_world_size(elastic, stop):
    settings, whole = elastic
    loader = TrainLoader(settings, 6, 3, 1, 2)
    take(loader, stop)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["step"]) == divmod(stop, loader.steps)
    for world_size, workers in ((1, 1), (3, 0), (4, 0)):
        again = stream(settings.model_copy(update={"workers": workers}), 12, world_size, state, 16 - stop)
        assert again == whole[stop:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_order_and_the_pixels_depend_on_the_seed_alone(folder):
    settings = options(folder, scale_min=0)
    first = take(TrainLoader(settings, 3, 1), 9)
    for change in ({"cache_mb": 0}, {"workers": 1}, {"workers": 3}):
        assert same(first, take(TrainLoader(settings.model_copy(update=change), 3, 1), 9)), change
    assert not same(first, take(TrainLoader(settings, 3, 2), 9))


@pytest.mark.parametrize("crop", ["random", "center", "random-resized"])
def test_crops_are_keyed_and_random_ones_change_with_the_epoch(folder, crop):
    crops: dict[str, list[torch.Tensor]] = {}
    settings = options(folder, scale_min=0, crop=crop, flip=False)
    batches, again = (take(TrainLoader(settings, 4, 0), 10) for _ in range(2))  # two epochs of five steps
    assert same(batches, again)
    for batch in batches:
        assert batch.images.shape[2:] == (8, 8)
        for key, image in zip(batch.keys, batch.images, strict=True):
            crops.setdefault(key, []).append(image)
    assert all(len(two) == 2 for two in crops.values())
    changed = sum(not torch.equal(*two) for two in crops.values())
    assert changed == 0 if crop == "center" else changed >= 18


@pytest.mark.parametrize(("workers", "stop"), [(0, 0), (0, 13), (2, 1), (2, 13)])
def test_a_saved_state_goes_on_exactly(folder, workers, stop):
    settings = options(folder, workers=workers)
    whole = take(TrainLoader(settings, 3, 1), 18)
    first = TrainLoader(settings, 3, 1)
    assert same(take(first, stop), whole[:stop])
    state = json.loads(json.dumps(first.state_dict()))
    assert state["epoch"] * 6 + state["step"] == stop  # not what workers prepared
    second = TrainLoader(settings, 3, 1)
    second.load_state_dict(state)
    assert same(take(second, 18 - stop), whole[stop:])
    assert second.epoch == 18 // 6
    assert same(take(first, 18 - stop), whole[stop:])  # so does the loader itself


@pytest.mark.parametrize(
    ("changed", "arguments", "says"),
    [
        ({}, (3, 2, 0, 1), "seed"),
        ({}, (4, 1, 0, 1), "global_batch"),
        ({}, (3, 1, 1, 2), "global_batch"),
        ({"pad": True}, (3, 1, 0, 1), "pad"),
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
    for damage in ({"step": None}, {"step": 99}, {"format_version": 99}):
        with pytest.raises(DataError, match="resume"):
            loader.load_state_dict({**loader.state_dict(), **damage})
    with pytest.raises(DataError, match="resume"):
        loader.load_state_dict({})


def test_the_held_out_slice_is_disjoint_and_complete(folder):
    settings = options(folder, validation="auto", validation_fraction=0.3)
    loader = TrainLoader(settings, 2, 0)
    trained = {key for batch in take(loader, 10 * loader.steps) for key in batch.keys}
    shards = expand_shards(folder)
    held_out = {key for batch in image_batches(shards, 8, 4, only_held_out=0.3) for key in batch.keys}
    everything = {key for batch in image_batches(shards, 8, 4) for key in batch.keys}
    assert held_out
    assert not trained & held_out
    assert trained | held_out == everything
    assert (loader.samples, loader.held_out) == (len(trained), len(held_out))
    assert all(is_held_out(key, 0.3) for key in held_out)


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
        ({"validation": "auto", "validation_fraction": 0.999}, (1, 0), "held out"),
        ({"shards": None}, (1, 0), "data.shards"),
        ({}, (0, 0), "batch size is 0"),
    ],
)
def test_too_few_images_are_an_error_before_training_starts(folder, rest, arguments, says):
    settings = options(folder, **rest) if "shards" not in rest else DataOptions()
    with pytest.raises(DataError, match=says):
        TrainLoader(settings, *arguments)


def test_validation_shards_must_not_be_trained_on(folder, tmp_path, make_shards):
    with pytest.raises(DataError, match="separate them"):
        TrainLoader(options(folder, validation=f"{folder}/003.tar"), 1, 0)
    with pytest.raises(ShardError, match="no shard"):
        TrainLoader(options(folder, validation=f"{tmp_path}/missing.tar"), 1, 0)
    assert TrainLoader(options(folder, validation=make_shards(tmp_path, [2])), 1, 0).samples == 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_replaced_and_listed(tmp_path, write_tar, make_png, workers):
    members = [(f"{number:02}.png", make_png(number)) for number in range(20)]
    members[7] = ("07.jpg", b"<html>not found</html>")
    write_tar(tmp_path / "a.tar", members)
    log = tmp_path / "bad.jsonl"
    settings = options(tmp_path, workers=workers, max_bad_share=0.2)
    batches = take(TrainLoader(settings, 5, 0, bad_log=log), 8)
    assert all(batch.images.shape[0] == 5 for batch in batches)
    keys = [key for batch in batches for key in batch.keys]
    assert "07" not in keys
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(r["key"], r["epoch"]) for r in records] == [("07", 0), ("07", 1)]
    assert "is not an image" in records[0]["reason"]
    assert records[0]["replaced_by"] in keys
    # On any worker the same.
    assert take(TrainLoader(options(tmp_path, max_bad_share=0.2), 5, 0), 8)[1].keys == batches[1].keys


def test_replacements_do_not_depend_on_the_world_size(tmp_path, write_tar, make_png):
    members = [(f"{n:02}.png", b"" if n % 10 == 3 else make_png(n)) for n in range(40)]
    write_tar(tmp_path / "a.tar", members)
    settings = options(tmp_path, max_bad_share=0.5)
    assert stream(settings, 4, 2, None, 20) == stream(settings, 4, 1, None, 20)


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_stop_the_run_in_one_line(tmp_path, write_tar, make_png, workers):
    members = [(f"{n:02}.png", b"damaged" if n % 3 else make_png(n)) for n in range(60)]
    write_tar(tmp_path / "a.tar", members)
    loader = TrainLoader(options(tmp_path, workers=workers), 4, 0, bad_log=tmp_path / "bad.jsonl")
    says = r"images could not be read .*bad\.jsonl; repair the data set or raise data.max_bad_share"
    with pytest.raises(DataError, match=says) as caught:
        take(loader, 15)
    assert "\n" not in str(caught.value)


def test_a_row_of_bad_images_stops_the_run_and_a_set_without_any_good_one_says_so(
    tmp_path, write_tar, make_png
):
    write_tar(tmp_path / "a.tar", [(f"{n:02}.png", make_png(n) if n % 2 else b"damaged") for n in range(40)])
    with pytest.raises(DataError, match="could not be read"):
        take(TrainLoader(options(tmp_path, max_bad_share=1, max_bad_in_a_row=3), 1, 0), 40)
    write_tar(tmp_path / "none" / "a.tar", [(f"{n:02}.png", b"damaged") for n in range(40)])
    with pytest.raises(DataError, match="and 16 replacements can't be read"):
        take(TrainLoader(options(tmp_path / "none"), 4, 0), 1)


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
    monkeypatch.setattr(
        "latentae.data.loader.decode_sample", lambda raw, **_: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(DataError, match="worker died"):
        take(TrainLoader(options(folder, workers=1), 3, 0), 1)


def test_decoded_images_are_kept_up_to_a_limit_of_memory(tmp_path, write_tar, make_png, monkeypatch):
    decoded: list[str] = []

    def counted(raw, **rest):
        decoded.append(raw["__key__"])
        return decode_sample(raw, **rest)

    monkeypatch.setattr("latentae.data.loader.decode_sample", counted)
    # 0.75 MB each.
    write_tar(tmp_path / "a.tar", [(f"{number}.png", make_png(number, 500, 500)) for number in range(3)])
    for megabytes, expected in ((0, 9), (1, 3 + 2 + 2), (3, 3)):
        decoded.clear()
        take(TrainLoader(options(tmp_path, cache_mb=megabytes), 3, 0), 3)
        assert len(decoded) == expected


def test_buckets_make_batches_of_one_size_in_the_same_order_on_any_rank_and_after_a_resume(
    tmp_path, write_tar, make_png
):
    sizes = [(40, 80), (80, 40), (64, 64)]
    write_tar(tmp_path / "a.tar", [(f"{n:02}.png", make_png(n, *sizes[n % 3])) for n in range(40)])
    bucketed = options(tmp_path, buckets="auto", bucket_step=8, resolution=24)
    loader = TrainLoader(bucketed, 4, 0)
    batches = take(loader, 2 * loader.steps)
    shapes = {tuple(batch.images.shape[2:]) for batch in batches}
    assert len(shapes) == 3
    assert all(height * width <= 24 * 24 for height, width in shapes)
    for batch in batches:  # images of one shape share a batch
        assert len({int(key) % 3 for key in batch.keys}) == 1
    first = [key for batch in batches[: loader.steps] for key in batch.keys]
    assert len(set(first)) == len(first) == 40 - loader.tail
    assert stream(bucketed, 4, 2, None, 15, seed=0) == [batch.keys for batch in batches[:15]]
    begun = TrainLoader(bucketed, 4, 0)
    take(begun, 6)
    again = TrainLoader(bucketed, 4, 0)
    again.load_state_dict(begun.state_dict())
    assert same(take(again, 9), batches[6:15])


@pytest.mark.parametrize(
    ("channels", "bits", "dtype", "workers"),
    [(3, 8, torch.uint8, 0), (1, 8, torch.uint8, 2), (4, 8, torch.uint8, 0), (3, 16, torch.uint16, 2)],
)
def test_a_batch_is_channels_last_and_has_the_channels_and_bits_asked_for(
    folder, channels, bits, dtype, workers
):
    (batch,) = take(TrainLoader(options(folder, channels=channels, bits=bits, workers=workers), 4, 0), 1)
    assert batch.images.shape == (4, channels, 8, 8)
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert len(batch.keys) == 4


PROGRAM = """
import os, signal, sys, time
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions

got = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
loader = TrainLoader(DataOptions(shards=sys.argv[1], resolution=8, validation="none", workers=2), 4, 0)
for number in map(int, sys.argv[2:]):
    batches = iter(loader)
    next(batches)
    os.killpg(os.getpgrp(), number)
    time.sleep(0.3)
    for _ in range(20):
        next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5, "workers that do not end when they are asked are waited for 5 s each"
print(got)
"""


def test_a_signal_to_the_whole_job_is_left_to_the_trainer(tmp_path, make_shards):
    numbers = [int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)]
    command = [sys.executable, "-c", PROGRAM, make_shards(tmp_path, [12, 12]), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(numbers)
    assert "Traceback" not in done.stderr


class NoRoom:
    """`Tensor.share_memory_` in a container whose /dev/shm is full."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)\nmore"
        )


@pytest.mark.parametrize("loader", [TrainLoader, StreamLoader])
def test_no_room_for_a_batch_is_said_in_one_line(loader, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    write_shards(
        ({"__key__": str(i), "png": encode_png(image)} for i, image in enumerate(images)), tmp_path / "shards"
    )
    # Workers are forked, so they see it.
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: NoRoom()(tensor))
    options = DataOptions(shards=str(tmp_path / "shards"), resolution=16, workers=2, validation="none")
    says = (
        r"could not put a batch of 0\.0\d+ MB into shared memory .*--shm-size=8g.* or set data.workers to 0"
    )
    with pytest.raises(DataError, match=says):
        next(iter(loader(options, 2, seed=0)))
    assert not multiprocessing.active_children()  # the end of the process would wait for them


def test_without_workers_nothing_is_shared(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    write_shards(
        ({"__key__": str(i), "png": encode_png(image)} for i, image in enumerate(images)), tmp_path / "shards"
    )
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: NoRoom()(tensor))
    options = DataOptions(shards=str(tmp_path / "shards"), resolution=16, workers=0, validation="none")
    assert len(next(iter(TrainLoader(options, 2, seed=0))).images) == 2
