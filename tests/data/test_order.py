from __future__ import annotations

import itertools

import pytest

import latentae
from latentae import cli
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions
from latentae.data.selection import is_held_out
from latentae.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_shards):
    return make_shards(tmp_path_factory.mktemp("listed"), [23, 4, 0, 40])


def global_stream(folder, world_size: int, **rest) -> list[tuple[int, str]]:
    ranks = [
        list(latentae.order(folder, global_batch=12, world_size=world_size, rank=r, **rest))
        for r in range(world_size)
    ]
    by_step = sorted(
        itertools.chain.from_iterable(ranks), key=lambda line: line[0]
    )  # stable: ranks in order inside a step
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
