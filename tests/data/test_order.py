from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import latentae
from latentae import cli
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions
from latentae.data.order import EpochOrder, is_held_out, lane_share
from latentae.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("listed"), [23, 4, 0, 40])


def global_stream(folder, world_size: int, **rest) -> list[tuple[int, str]]:
    ranks = [
        list(latentae.order(folder, global_batch=12, world_size=world_size, rank=r, **rest))
        for r in range(world_size)
    ]
    # Stable: ranks in order inside a step.
    by_step = sorted(itertools.chain.from_iterable(ranks), key=lambda line: line[0])
    return by_step


@pytest.mark.parametrize(("world_size", "workers"), [(2, 0), (3, 1), (4, 4), (6, 1)])
def test_the_stream_is_the_same_at_every_world_size(folder, world_size, workers):
    assert global_stream(folder, world_size, workers=workers) == global_stream(folder, 1)


def test_it_lists_what_the_loader_gives(folder):
    options = DataOptions(shards=folder, resolution=8, validation="none")
    loader = TrainLoader(options, 6, 5, 1, 2)
    iterator = iter(loader)
    batches = [next(iterator) for _ in range(2 * loader.steps)]
    for epoch in (0, 1):
        listed = latentae.order(folder, seed=5, epoch=epoch, global_batch=12, world_size=2, rank=1)
        given = batches[epoch * loader.steps : (epoch + 1) * loader.steps]
        assert list(listed) == [(step, key) for step, batch in enumerate(given) for key in batch.keys]
        assert (listed.steps, listed.tail) == (loader.steps, loader.tail)


def test_start_and_limit_count_global_steps_of_the_epoch_and_the_held_out_slice_is_left_out(folder):
    whole = list(latentae.order(folder, global_batch=4, world_size=2))
    part = list(latentae.order(folder, global_batch=4, world_size=2, start=7, limit=3))
    assert part == [line for line in whole if 7 <= line[0] < 10]
    assert list(latentae.order(folder, global_batch=4, start=16)) == []
    keys, everything = (
        sorted(key for _, key in latentae.order(folder, global_batch=1, held_out=share))
        for share in (0.3, 0.0)
    )
    assert keys == [key for key in everything if not is_held_out(key, 0.3)]


def test_the_command_prints_one_line_a_sample_and_counts_the_tail(folder, capsys):
    def lines(*arguments: str) -> tuple[list[str], str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["order", folder, "--global-batch", "8", *arguments])
        said = capsys.readouterr()
        assert not stop.value.code, said.err
        return said.out.splitlines(), said.err

    rows, tail = lines("--seed", "3", "--epoch", "1", "--start", "2", "--limit", "2")
    assert rows == [
        f"{step}\t{key}"
        for step, key in latentae.order(folder, seed=3, epoch=1, global_batch=8, start=2, limit=2)
    ]
    assert [row.split("\t")[0] for row in rows] == ["2"] * 8 + ["3"] * 8
    assert tail.strip() == "epoch 1 has 8 steps; last 3 samples skipped (incomplete batch)"
    padded, tail = lines("--pad")
    assert len(padded) == 72
    assert "epoch 0 has 9 steps; last 0 samples" in tail


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"global_batch": 12, "world_size": 5}, "a batch that the ranks divide"),
        ({"rank": 1}, "a rank from 0 to world size - 1"),
        ({"global_batch": 68}, "found 67 samples .*one batch takes 68"),
        ({"start": 5}, "start 5 is outside the epoch, which has steps 0 to 3"),
    ],
)
def test_bad_requests_say_what_is_wrong(folder, arguments, says):
    with pytest.raises(DataError, match=says):
        latentae.order(folder, **arguments)


SMALL = {"slice_samples": 4}


def listing(order: EpochOrder, start: int = 0) -> list[list[tuple[int, int, int]]]:
    """(pool, shard, row) of each lane in each step, every lane read from `start` on."""
    done = order.done(start)
    lanes = {}
    batches = []
    for step in range(start, order.steps):
        pool = order.pool_of(step)
        batch = []
        for lane in range(order.batch_size):
            if (pool, lane) not in lanes:
                runs = order.lane(lane, pool, done[pool])
                lanes[pool, lane] = ((pool, run.shard, row) for run in runs for row in run.rows)
            batch.append(next(lanes[pool, lane]))
        batches.append(batch)
    return batches


counts = st.lists(st.integers(0, 23), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(st.lists(counts, min_size=1, max_size=3), st.integers(1, 9), st.integers(0, 3), st.booleans())
def test_every_sample_comes_at_most_once_and_only_the_tail_is_missing(pools, batch_size, epoch, pad):
    order = EpochOrder(pools, 7, epoch, "d", batch_size, pad, slice_samples=4)
    seen = list(itertools.chain.from_iterable(listing(order)))
    everything = {
        (p, s, row)
        for p, counts in enumerate(pools)
        for s, count in enumerate(counts)
        for row in range(count)
    }
    assert set(seen) <= everything
    assert len(seen) == order.steps * batch_size
    if pad:
        assert set(seen) == everything
        assert order.tail == 0
    else:
        assert len(set(seen)) == len(seen)
        assert len(everything) - len(seen) == order.tail
        assert order.tail < batch_size * len(pools)


@settings(max_examples=40, deadline=None)
@given(st.lists(counts, min_size=1, max_size=3), st.integers(1, 6), st.booleans(), st.data())
def test_going_on_from_any_step_gives_the_same_steps(pools, batch_size, pad, data):
    order = EpochOrder(pools, 3, 1, "d", batch_size, pad, slice_samples=4)
    start = data.draw(st.integers(0, order.steps))
    assert listing(order, start) == listing(order)[start:]


def test_the_formula_of_lanes():
    order = EpochOrder([[40, 25]], 0, 0, "d", 5, slice_samples=8)
    alone = EpochOrder([[40, 25]], 0, 0, "d", 1, slice_samples=8)  # one lane reads the complete virtual array
    virtual = [(0, run.shard, row) for run in alone.lane(0, 0) for row in run.rows]
    steps = 65 // 5
    assert listing(order) == [[virtual[lane * steps + step] for lane in range(5)] for step in range(steps)]


def test_seed_epoch_and_data_set_decide_and_nothing_else():
    def keys(seed=1, epoch=0, digest="d", batch=4):
        return listing(EpochOrder([[30, 30]], seed, epoch, digest, batch, **SMALL))

    assert keys() == keys()
    assert keys(seed=2) != keys() != keys(epoch=1)
    assert keys(digest="e") != keys()


def test_the_order_is_written_in_stone():
    """A run of an older version must resume with the same samples: this listing never changes."""
    order = EpochOrder([[7, 6]], 1, 2, "digest", 3, slice_samples=4)
    assert [[(shard, row) for _, shard, row in batch] for batch in listing(order)] == GOLDEN


GOLDEN = [
    [(1, 3), (0, 0), (1, 1)],
    [(1, 4), (0, 1), (0, 5)],
    [(1, 5), (1, 2), (0, 3)],
    [(0, 2), (1, 0), (0, 6)],
]


def test_a_slice_is_read_by_one_lane_or_two_neighbors():
    order = EpochOrder([[64] * 40], 0, 0, "d", 8, slice_samples=16)
    lanes_of = {}
    for lane in range(8):
        for run in order.lane(lane, 0):
            for row in run.rows:
                lanes_of.setdefault((run.shard, row // 16), set()).add(lane)
    # A lane's end cuts at most one slice.
    assert sum(len(lanes) for lanes in lanes_of.values()) <= len(lanes_of) + 7


def test_a_class_sorted_set_is_mixed_nearly_as_well_as_by_a_full_shuffle():
    """The spread of the class share over batches, relative to that of independent draws."""
    shards, each, batch = 100, 200, 64
    order = EpochOrder([[each] * shards], 5, 0, "sorted by class", batch, slice_samples=64)
    label = np.repeat(np.arange(10), shards // 10)
    shares = np.array(
        [np.bincount([label[shard] for _, shard, _ in b], minlength=10) / batch for b in listing(order)]
    )
    full = (
        np.random.default_rng(0).permutation(np.repeat(label, each))[: len(shares) * batch].reshape(-1, batch)
    )
    independent = np.array([np.bincount(b, minlength=10) / batch for b in full])
    assert abs(shares.std() / independent.std() - 1) < 0.15


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.integers(1, 9))
def test_lanes_are_shared_out_evenly_and_in_order(lanes, parts):
    shares = [list(lane_share(range(100, 100 + lanes), part, parts)) for part in range(parts)]
    assert list(itertools.chain.from_iterable(shares)) == list(range(100, 100 + lanes))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_looking_up_a_position_is_instant_in_a_large_set():
    order = EpochOrder([[10_000] * 2_000], 0, 0, "d", 1024)  # 20 million samples
    (run, *_) = itertools.islice(order.lane(1000, 0, 12_345), 1)
    assert 0 <= run.shard < 2_000
    assert all(0 <= row < 10_000 for row in run.rows)
