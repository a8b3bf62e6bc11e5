from __future__ import annotations

import itertools

import pytest
import torch

from latentae.data.loader import Batch
from latentae.data.options import DataOptions
from latentae.data.streaming import StreamLoader, streams
from latentae.errors import DataError, ShardError


@pytest.fixture
def remote(tmp_path, make_shards, memory):
    make_shards(tmp_path, [30, 30])
    for shard in sorted(tmp_path.glob("*.tar")):
        memory.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    return "memory://bucket"


def options(remote: str, **rest) -> DataOptions:
    return DataOptions(**{"shards": f"{remote}/{{000..001}}.tar", "resolution": 8, **rest})


def take(loader: StreamLoader, count: int) -> list[Batch]:
    return list(itertools.islice(iter(loader), count))


def test_remote_shards_without_an_index_are_streamed_and_others_are_not(remote, tmp_path, make_shards):
    assert streams([f"{remote}/000.tar"], None)
    assert not streams([f"{remote}/000.tar"], str(tmp_path))
    assert not streams([make_shards(tmp_path / "local", [3]) + "/000.tar"], None)
    assert not streams([], None)


def test_batches_come_without_end_from_all_shards(remote):
    batches = take(StreamLoader(options(remote), 4, 0), 60)
    keys = [key for batch in batches for key in batch.keys]
    assert len(keys) == 240  # of 60 samples: with replacement
    assert {key[:2] for key in keys} == {"s0", "s1"}
    assert batches[0].images.shape == (4, 3, 8, 8)
    assert batches[0].images.dtype == torch.uint8


def test_the_same_seed_and_rank_draw_the_same_and_others_do_not(remote):
    def keys(seed=0, rank=0):
        return [batch.keys for batch in take(StreamLoader(options(remote), 4, seed, rank), 5)]

    assert keys() == keys()
    assert keys(rank=1) != keys() != keys(seed=1)


def test_a_run_that_goes_on_draws_anew_and_says_so(remote, capsys):
    first = StreamLoader(options(remote), 4, 0)
    before = [batch.keys for batch in take(first, 5)]
    second = StreamLoader(options(remote), 4, 0)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert [batch.keys for batch in take(second, 5)] != before
    second.announce()
    said = capsys.readouterr()
    assert "only a statistical resume is promised" in " ".join((said.out + said.err).split())
    with pytest.raises(DataError, match="began on indexed shards"):
        first.load_state_dict({"format_version": 2, "epoch": 0, "step": 3})
    with pytest.raises(DataError, match=r"data.buckets is auto, which needs the sizes of all images"):
        StreamLoader(options(remote, buckets="auto"), 4, 0)


def test_bad_images_are_passed_over_and_a_row_of_them_stops(remote, memory, tmp_path, write_tar, make_png):
    members = [(f"{n:02}.png", make_png(n) if n % 2 else b"damaged") for n in range(20)]
    memory.pipe("/bucket/bad.tar", write_tar(tmp_path / "bad.tar", members).read_bytes())
    settings = options(remote).model_copy(update={"shards": f"{remote}/bad.tar"})
    batches = take(StreamLoader(settings, 4, 0), 5)
    assert all(int(key) % 2 for batch in batches for key in batch.keys)
    assert sum(len(batch.bad) for batch in batches) > 5
    with pytest.raises(DataError, match="2 samples in a row can't be read"):
        take(StreamLoader(settings.model_copy(update={"max_bad_in_a_row": 2}), 4, 0), 50)


def test_a_damaged_shard_is_an_error_of_one_line(remote, memory):
    memory.pipe("/bucket/page.tar", b"<html>not found</html>" * 100)
    settings = options(remote).model_copy(update={"shards": f"{remote}/page.tar"})
    with pytest.raises(ShardError, match=r"page\.tar could not be read") as caught:
        take(StreamLoader(settings, 4, 0), 1)
    assert "\n" not in str(caught.value)
