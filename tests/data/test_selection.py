from __future__ import annotations

from latentae.data.selection import Selection, is_held_out
from latentae.data.shard_files import expand_shards
from latentae.data.shard_index import load_index


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
