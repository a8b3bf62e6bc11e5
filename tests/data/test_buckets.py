from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.data.selection import NO_BUCKET, assign_buckets, default_buckets
from latentae.errors import DataError


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
