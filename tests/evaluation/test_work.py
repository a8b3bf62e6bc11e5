from __future__ import annotations

import multiprocessing
import signal

from hypothesis import given
from hypothesis import strategies as st

from latentae.data.shard_files import expand_shards, read_shard
from latentae.data.shard_index import load_index
from latentae.evaluation.work import PartsFolder, cut, samples_at, spread


@given(st.integers(1, 100_000))
def test_chunks_cover_every_position_once(total):
    chunks = cut(total)
    assert [position for chunk in chunks for position in chunk] == list(range(total))
    assert len(chunks) <= 32
    assert all(len(chunk) == len(chunks[0]) and len(chunk) % 16 == 0 for chunk in chunks[:-1])


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_spread_has_the_ends_and_no_position_twice(count, wanted):
    positions = spread(count, wanted)
    assert len(positions) == len(set(positions)) == min(wanted, count)
    assert positions == sorted(positions)
    assert positions[0] == 0
    if len(positions) > 1:
        assert positions[-1] == count - 1


@given(st.integers(1, 700), st.integers(1, 9))
def test_the_shares_of_all_tasks_are_all_chunks(tmp_path_factory, total, tasks):
    parts = PartsFolder(tmp_path_factory.mktemp("parts"), total)
    shares = [parts.share(task, tasks) for task in range(tasks)]
    assert sorted(number for share in shares for number in share) == list(range(len(parts.chunks)))


def test_samples_at_reads_these_and_no_others(workspace):
    paths = expand_shards(workspace / "training")
    index, every = load_index(paths), [raw["__key__"] for path in paths for raw in read_shard(path)]
    positions = [0, 3, 9, 10, 19]
    found = list(samples_at(index, positions))
    assert [position for position, _ in found] == positions
    assert [raw["__key__"] for _, raw in found] == [every[position] for position in positions]


def hold(folder, taken):
    with PartsFolder(folder, 1).alone() as mine:
        taken.put(mine)
        signal.pause()


def test_one_process_at_a_time_finishes_and_a_dead_one_lets_go(tmp_path):
    context = multiprocessing.get_context("spawn")
    taken = context.SimpleQueue()
    process = context.Process(target=hold, args=(tmp_path, taken))
    process.start()
    assert taken.get() is True
    with PartsFolder(tmp_path, 1).alone() as mine:
        assert mine is False
    process.kill()
    process.join()
    with PartsFolder(tmp_path, 1).alone() as mine:
        assert mine is True


def test_a_folder_cleared_away_is_nobodys_to_finish(tmp_path):
    parts = PartsFolder(tmp_path / "parts", 20)
    (tmp_path / "parts").rmdir()
    assert not parts.complete()
    with parts.alone() as mine:
        assert mine is False
    assert not (tmp_path / "parts").exists()
