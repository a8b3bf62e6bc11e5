from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import pytest

from latentae.data.shard_files import expand_shards, read_shard, shard_keys
from latentae.errors import ShardError


@pytest.fixture
def three(tmp_path, write_tar):
    for number in range(3):
        write_tar(tmp_path / f"{number:03}.tar", [("a.txt", b"x")])
    (tmp_path / "notes.txt").write_text("no shard")
    return tmp_path


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


@pytest.mark.parametrize(
    "spec",
    [
        "{0}",
        "{0}/*.tar",
        "{0}/{{000..002}}.tar",
        "{0}/000.tar::{0}/001.tar::{0}/00[2-9].tar",
        "{0}/00{{0,1,2}}.tar",
    ],
)
def test_every_kind_of_specification_names_the_same_shards(three, spec):
    assert names(expand_shards(spec.format(three))) == ["000.tar", "001.tar", "002.tar"]
    # A sequence keeps its order.
    assert names(expand_shards([three / "002.tar", f"{three}/000.tar"])) == ["002.tar", "000.tar"]


def test_a_name_with_special_characters_is_taken_as_it_is(tmp_path, write_tar):
    path = write_tar(tmp_path / "odd {1} [x]" / "a*.tar", [("a.txt", b"x")])
    assert expand_shards(str(path)) == expand_shards(str(path.parent)) == [str(path)]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{0}/{{000..003}}.tar", "no shard .*003.tar"),
        ("{0}/x*.tar", "no shard matches"),
        ("{0}/missing", "no shard .*missing"),
        ("{0}/{{000..", "no shard|unbalanced"),
        ("", "no shards in"),
        ("{0}/empty", "latentae shards"),
        ("{0}/000.tar::{0}/*.tar", "named twice"),
        ("pipe:cat {0}/000.tar", "local files or URLs"),
    ],
)
def test_a_specification_that_names_nothing_is_one_clear_line(three, spec, says):
    (three / "empty").mkdir()
    with pytest.raises(ShardError, match=says) as caught:
        expand_shards(spec.format(three))
    assert "\n" not in str(caught.value)


def test_samples_come_in_tar_order_with_their_members(tmp_path, write_tar):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    bomb = pickle.dumps(Bomb())
    members = [
        ("d/b.jpg", b"1"),
        ("d/b.txt", b"2"),
        ("a.JPG", b"3"),
        ("a.seg.png", b"4"),
        ("a.pkl", bomb),
        ("noextension", b"5"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert list(read_shard(path)) == [
        {"__key__": "d/b", "__url__": str(path), "jpg": b"1", "txt": b"2"},
        {"__key__": "a", "__url__": str(path), "jpg": b"3", "seg.png": b"4", "pkl": bomb},
    ]
    assert shard_keys(path) == ["d/b", "a"]
    assert list(read_shard(write_tar(tmp_path / "empty.tar", []))) == []


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a.jpg", "b.jpg", "a.jpg"], "came before"),
        (["a.jpg", "a.JPG"], "came before"),
        (["a.jpg", "../up.jpg"], "outside"),
    ],
)
def test_samples_that_can_not_be_told_apart_or_point_outside_are_refused(tmp_path, write_tar, names, says):
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(ShardError, match=says) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_what_is_no_tar_is_an_error_that_names_it(tmp_path, write_tar):
    whole = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")]).read_bytes()
    for name, data in {
        "empty.tar": b"",
        "text.tar": b"<html>404</html>" * 100,
        "gzip.tar": gzip.compress(whole),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ShardError, match=name):
            read_shard(tmp_path / name)
    with pytest.raises(ShardError, match="no shard"):
        read_shard(tmp_path / "missing.tar")


def test_a_damaged_tar_is_whole_or_an_error(tmp_path, write_tar):
    """Cut at every block and between, or with a bit flipped: no sample is lost in silence."""
    members = [
        (f"k{number}.{extension}", bytes([65 + number]) * (300 * number))
        for number in range(4)
        for extension in ("jpg", "txt")
    ]
    members.append(("zeros.npy", bytes(1500)))  # looks like the end of the archive when cut here
    path = write_tar(tmp_path / "damaged.tar", members)
    content, samples = path.read_bytes(), list(read_shard(path))
    used = content.rindex(b"zeros.npy") + 2560
    for length in (*range(0, len(content), 512), *range(100, used, 512), len(content) - 1):
        path.write_bytes(content[:length])
        try:
            assert list(read_shard(path)) == samples, length
        except ShardError as error:
            assert "damaged.tar" in str(error)  # noqa: PT017
    for byte in range(0, used, 41):
        flipped = bytearray(content)
        flipped[byte] ^= 1 << byte % 8
        path.write_bytes(flipped)
        try:
            found = list(read_shard(path))
        except ShardError as error:
            assert "damaged.tar" in str(error)  # noqa: PT017
        else:  # the bit was in a member's bytes, which a tar can't check, or in padding
            assert [(sample["__key__"], sample.keys()) for sample in found] == [
                (one["__key__"], one.keys()) for one in samples
            ]
