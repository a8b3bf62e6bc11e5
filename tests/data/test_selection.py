from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.data.order import NO_BUCKET, Selection, assign_buckets, default_buckets, is_held_out
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index
from latentae.errors import DataError


def test_rows_and_counts_agree_with_the_keys(tmp_path, make_shards):
    index = load_index(expand_shards(make_shards(tmp_path, [30, 0, 50])))
    selection = Selection(index, held_out=0.25)
    for shard in range(3):
        keys = index.table(shard).keys()
        (rows,) = selection.rows(shard)
        assert rows.tolist() == [row for row, key in enumerate(keys) if not is_held_out(key, 0.25)]
    assert selection.counts() == [[len(selection.rows(shard)[0]) for shard in range(3)]]
    assert Selection(index, held_out=1.0).counts() == [[0, 0, 0]]


def test_without_a_condition_everything_is_used_and_nothing_is_opened(tmp_path, make_shards, monkeypatch):
    index = load_index(expand_shards(make_shards(tmp_path, [3, 5])))
    monkeypatch.setattr(type(index), "table", lambda *_: 1 / 0)
    assert Selection(index).counts() == [[3, 5]]
    assert Selection(index).rows(1)[0].tolist() == [0, 1, 2, 3, 4]


def test_the_held_out_fraction_is_kept_and_grows_by_inclusion():
    keys = [f"a/{number}" for number in range(5000)]
    small, large = ({key for key in keys if is_held_out(key, fraction)} for fraction in (0.02, 0.1))
    assert 60 < len(small) < 145
    assert small < large
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert all(is_held_out(key, 1.0) for key in keys)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.sampled_from([8, 16, 64]), st.floats(1, 4))
def test_buckets_keep_to_area_step_and_ratio(multiple, step, max_ratio):
    resolution = multiple * step
    buckets = default_buckets(resolution, step, max_ratio)
    assert (resolution, resolution) in buckets
    assert len(set(buckets)) == len(buckets)
    for high, wide in buckets:
        assert high % step == wide % step == 0
        assert high * wide <= resolution**2
        assert max(high, wide) <= max_ratio * min(high, wide)
        assert (wide, high) in buckets
        largest = resolution**2 / min(high, wide)
        assert min(high, wide) == resolution or max(high, wide) + step > largest, (
            "none is smaller than need be"
        )
    assert [wide / high for high, wide in buckets] == sorted(wide / high for high, wide in buckets)


def test_the_default_buckets_of_512_and_settings_that_make_none():
    assert default_buckets(512) == ((640, 384), (576, 448), (512, 512), (448, 576), (384, 640))
    for arguments in ((500, 64, 2.0), (32, 64, 2.0), (512, 0, 2.0), (512, 64, 0.5)):
        with pytest.raises(DataError, match="no buckets"):
            default_buckets(*arguments)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=8),
)
def test_each_image_gets_the_bucket_with_the_nearest_ratio(sizes, buckets):
    found = assign_buckets([height for height, _ in sizes], [width for _, width in sizes], buckets)
    for (height, width), number in zip(sizes, found, strict=True):
        apart = [abs(np.log(width / height) - np.log(wide / high)) for high, wide in buckets]
        assert apart[number] <= min(apart) + 1e-9


def test_ties_go_to_the_earlier_bucket():
    assert assign_buckets([30], [30], [(64, 64), (32, 32)]).tolist() == [0]
    assert assign_buckets([100], [100], [(1, 4), (4, 1)]).tolist() == [0]
    assert assign_buckets([100], [100], [(4, 1), (1, 4)]).tolist() == [0]


def test_an_unknown_size_has_no_bucket_and_buckets_without_area_are_refused():
    assert assign_buckets([0, 100, 100], [100, 0, 300], [(2, 2), (1, 3)]).tolist() == [
        NO_BUCKET,
        NO_BUCKET,
        1,
    ]
    assert assign_buckets(np.zeros(0, np.int32), np.zeros(0, np.int32), [(2, 2)]).tolist() == []
    for buckets in ([], [(0, 5)]):
        with pytest.raises(DataError, match="above zero"):
            assign_buckets([1], [1], buckets)
