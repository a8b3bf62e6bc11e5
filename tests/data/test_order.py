from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from latentae.data.order import derive_seed, pieces, share

counts = st.lists(st.integers(0, 9), min_size=1, max_size=6)


def samples(counts: list[int], seed: int, epoch: int, part: int, parts: int) -> list[tuple[int, int]]:
    return [
        (piece.shard, number) for piece in pieces(counts, seed, epoch, part, parts) for number in range(piece.start, piece.stop)
    ]


@given(counts, st.integers(0, 2**63), st.integers(0, 5), st.integers(1, 12))
def test_every_sample_is_read_once_per_epoch_by_shares_that_differ_by_one(counts, seed, epoch, parts):
    shares = [samples(counts, seed, epoch, part, parts) for part in range(parts)]
    assert Counter(sample for one in shares for sample in one) == Counter(
        (shard, n) for shard, count in enumerate(counts) for n in range(count)
    )
    assert [len(one) for one in shares] == [share(sum(counts), part, parts) for part in range(parts)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(counts, st.integers(0, 2**63), st.integers(1, 12))
def test_the_order_is_a_function_of_its_arguments(counts, seed, parts):
    assert samples(counts, seed, 3, 0, parts) == samples(counts, seed, 3, 0, parts)


def test_epochs_and_seeds_differ():
    orders = [samples([7, 7, 7, 7], seed, epoch, 0, 2) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    readers = np.zeros(28)
    for epoch in range(200):  # no sample stays with one reader
        for shard, number in samples([7, 7, 7, 7], 0, epoch, 0, 2):
            readers[shard * 7 + number] += 1
    assert readers.min() > 60
    assert readers.max() < 140


def test_almost_every_shard_has_one_reader():
    owners = Counter(piece.shard for part in range(4) for piece in pieces([10] * 40, 1, 0, part, 4))
    assert sum(owners.values()) <= 40 + 4 + 1


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed("order", 1, 2) == derive_seed("order", 1, 2) < 2**64
    assert len({derive_seed("a", 1), derive_seed("a", 2), derive_seed("b", 1), derive_seed("a", "1")}) == 4
    assert derive_seed("order", 0, 0) == 9753162313142695648  # recorded: a change here changes the data of every saved run
