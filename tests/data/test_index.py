from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from latentae.data.index import load_index, scan_shard, write_index
from latentae.data.shards import expand_shards
from latentae.errors import ShardError


def test_the_index_counts_samples_and_its_digest_does_not_depend_on_the_place(tmp_path, make_shards):
    paths = expand_shards(make_shards(tmp_path / "a", [3, 0, 2]))
    scanned = load_index(paths)
    assert (scanned.samples, [shard.samples for shard in scanned.shards]) == (5, [3, 0, 2])
    assert [shard.bytes for shard in scanned.shards] == [Path(path).stat().st_size for path in paths]
    written = write_index(tmp_path / "a", [scan_shard(path) for path in paths])
    assert written == scanned == load_index(paths)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert load_index(expand_shards(tmp_path / "b")).digest == scanned.digest
    assert load_index(paths[:1]).digest != scanned.digest


def test_the_index_file_spares_the_scan_until_a_size_differs(tmp_path, make_shards, write_tar, make_png):
    paths = expand_shards(make_shards(tmp_path, [3, 2]))
    write_index(tmp_path, [scan_shard(path) for path in paths])
    record = json.loads((tmp_path / "index.json").read_text())
    record["shards"][0]["samples"] = 30
    record["shards"][1]["samples"] = 20
    (tmp_path / "index.json").write_text(json.dumps(record))
    write_tar(Path(paths[1]), [(f"{number}.png", make_png(number, 64, 64)) for number in range(4)])
    assert [shard.samples for shard in load_index(paths).shards] == [30, 4]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format_version": 1}',
        '{"format_version": 99, "shards": []}',
        '{"format_version": 1, "shards": [1]}',
    ],
)
def test_an_index_file_of_no_use_is_passed_over(tmp_path, make_shards, text):
    paths = expand_shards(make_shards(tmp_path, [3]))
    (tmp_path / "index.json").write_text(text)
    assert load_index(paths).samples == 3


def test_no_samples_at_all_is_an_error(tmp_path, make_shards):
    with pytest.raises(ShardError, match="no samples in 2 shards"):
        load_index(expand_shards(make_shards(tmp_path, [0, 0])))


def test_a_missing_shard_is_an_error(tmp_path):
    with pytest.raises(ShardError, match="no shard"):
        load_index([str(tmp_path / "gone.tar")])
