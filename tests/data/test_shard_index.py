from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae.data import shard_index as index_module
from latentae.data.order import is_held_out
from latentae.data.shard_files import expand_shards, read_samples, read_shard
from latentae.data.shard_index import OPEN_TABLES, SUFFIX, load_index, scan_shard, write_index
from latentae.errors import OutputError, ShardError


@pytest.fixture
def folder(tmp_path, make_shards):
    return Path(make_shards(tmp_path / "shards", [3, 0, 2]))


@pytest.fixture
def scanned(monkeypatch):
    """The shards that were read to be indexed."""
    seen: list[str] = []
    scan = index_module.scan
    monkeypatch.setattr(
        index_module, "scan", lambda path, **rest: seen.append(Path(path).name) or scan(path, **rest)
    )
    return seen


def everything(index) -> list[dict]:
    return [
        raw
        for number, entry in enumerate(index.shards)
        for raw in read_samples(index, number, range(entry.samples))
    ]


def test_the_index_counts_samples_and_its_digest_does_not_depend_on_the_place(folder, tmp_path):
    paths = expand_shards(folder)
    loaded = load_index(paths)
    assert (loaded.samples, [shard.samples for shard in loaded.shards]) == (5, [3, 0, 2])
    assert [shard.bytes for shard in loaded.shards] == [Path(path).stat().st_size for path in paths]
    assert loaded.shards[0].sha256 == ""
    written = write_index(folder, [scan_shard(path) for path in paths])
    assert written == loaded == load_index(paths)
    assert len(written.shards[0].sha256) == 64
    assert written.digest == loaded.digest
    assert written.table(1).samples == 0
    shutil.copytree(folder, tmp_path / "b")
    assert load_index(expand_shards(tmp_path / "b")).digest == loaded.digest
    assert load_index(paths[:1]).digest != loaded.digest
    assert load_index([paths[2], paths[0]]).digest != load_index([paths[0], paths[2]]).digest


def test_a_table_says_where_everything_lies(tmp_path, write_tar, make_png):
    long = "d" * 120
    files = [
        ("a.jpg", b"x"),
        ("a.PNG", make_png(1, 30, 20)),
        ("a.txt", b"caption"),
        (f"{long}/b.png", make_png(2)),
        ("c.png", b"<html>"),
    ]
    path = write_tar(tmp_path / "x.tar", files)
    table = load_index([str(path)]).table(0)
    assert table.keys() == ["a", f"{long}/b", "c"] == [table.key(row) for row in range(3)]
    assert [extension for extension, _, _ in table.members(0)] == ["jpg", "png", "txt"]
    data = path.read_bytes()
    for extension, offset, size in table.members(0)[1:]:
        assert data[offset : offset + size] == dict(files)[{"png": "a.PNG", "txt": "a.txt"}[extension]]
    assert [column.dtype for column in (table.height, table.key_hash)] == [np.int32, np.uint64]
    starts, stops = zip(*map(table.span, range(3)), strict=True)
    assert starts[0] == 0
    assert starts[1:] == stops[:-1]  # no bytes are between these samples
    with tarfile.open(path) as archive:
        assert starts[1] == archive.getmembers()[3].offset  # with the header of the long name
    assert list(table.height) == [0, 12, 0]  # of several images the first format counts: a.jpg is none
    assert list(table.width) == [0, 16, 0]
    for fraction in (0.0, 0.3, 0.7, 1.0):
        kept = [int(value) < fraction * 2**64 for value in table.key_hash]
        assert kept == [is_held_out(table.key(row), fraction) for row in range(3)]


def test_samples_are_read_in_the_order_asked_for_with_allowed_members_only(tmp_path, write_tar, make_png):
    image = make_png(1)
    path = write_tar(
        tmp_path / "x.tar",
        [
            *(
                (f"a.{extension}", b"danger" * 300_000)
                for extension in ("pyd", "pth", "pkl", "seg.png", "npy")
            ),
            ("a.JPG", image),
            ("a.txt", b"caption"),
            ("b.png", image),
            ("b.cls", b"7"),
            ("b.json", b"{}"),
        ],
    )
    index = load_index([str(path)])
    first, second, third = read_samples(index, 0, [1, 0, 1])
    assert second == {"__key__": "a", "__url__": str(path), "jpg": image, "txt": b"caption"}
    assert first == third == {"__key__": "b", "__url__": str(path), "png": image, "cls": b"7", "json": b"{}"}


def test_all_samples_are_those_of_the_plain_reader_in_other_processes_too(folder):
    paths = expand_shards(folder)
    index = load_index(paths)
    assert everything(index) == [raw for path in paths for raw in read_shard(path)]
    small = pickle.dumps(index)
    assert len(small) < 2000
    again = pickle.loads(small)
    assert again == index
    assert everything(again) == everything(index)
    table = index.table(0)
    assert pickle.loads(pickle.dumps(table)).keys() == table.keys()
    assert len(pickle.dumps(table)) < 500


def test_a_second_start_reads_no_shard_until_one_changes(folder, scanned, write_tar, make_png, capsys):
    paths = expand_shards(folder)
    load_index(paths)
    assert sorted(scanned) == ["000.tar", "001.tar", "002.tar"]
    scanned.clear()
    load_index(paths)
    assert scanned == []
    write_tar(Path(paths[2]), [(f"{number}.png", make_png(number, 64, 64)) for number in range(4)])
    capsys.readouterr()
    assert [shard.samples for shard in load_index(paths).shards] == [3, 0, 4]
    assert scanned == ["002.tar"]
    assert "002.tar no longer fits" in capsys.readouterr().err
    ends = Path(paths[0])
    for names in ("abc", "zbc", "zby"):  # the same size, another first or last sample
        write_tar(ends, [(f"{name}.jpg", b"x") for name in names])
        scanned.clear()
        assert load_index([str(ends)]).table(0).keys() == list(names)
        assert scanned == ["000.tar"]


def test_a_shard_that_changed_in_the_middle_is_noticed_when_it_is_read(tmp_path, write_tar):
    path = write_tar(tmp_path / "x.tar", [(f"{name}.jpg", b"x" * 600) for name in "abcd"])
    index = load_index([str(path)])
    write_tar(path, [(f"{name}.jpg", b"y" * 600) for name in "azcd"])
    assert load_index([str(path)]) == index  # neither its size nor its ends differ
    assert next(read_samples(index, 0, [0]))["__key__"] == "a"
    with pytest.raises(ShardError, match=r"x\.tar has changed .*'b'"):
        list(read_samples(index, 0, [1]))
    content = bytearray(path.read_bytes())
    content[2 * 1536 + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"has changed .*'c'.*checksum"):
        list(read_samples(index, 0, [2]))
    path.write_bytes(content[:3000])
    with pytest.raises(ShardError, match="ends at byte"):
        list(read_samples(index, 0, [3]))
    path.unlink()
    with pytest.raises(ShardError, match="no shard"):
        list(read_samples(index, 0, [0]))


def test_an_index_that_is_replaced_under_way_is_noticed(folder, write_tar):
    paths = expand_shards(folder)
    index = load_index(paths)
    write_tar(Path(paths[0]), [("a.png", b"")])
    load_index(paths)
    with pytest.raises(ShardError, match="has changed since the start"):
        index.table(0)
    Path(paths[2] + SUFFIX).unlink()
    with pytest.raises(ShardError, match="can't be read"):
        index.table(2)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_damaged_index_is_made_again_or_an_error(tmp_path_factory, write_tar, data):
    folder = tmp_path_factory.getbasetemp() / "damaged-index"
    path = write_tar(folder / "x.tar", [(f"{name}.jpg", b"x" * 600) for name in "abcd"])
    index = load_index([str(path)])
    good, hashes = everything(index), list(index.table(0).key_hash)
    content = bytearray(Path(str(path) + SUFFIX).read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    Path(str(path) + SUFFIX).write_bytes(content)
    try:
        index = load_index([str(path)])
        found, table = everything(index), index.table(0)
        assert list(table.key_hash) == hashes
        assert list(table.height) == list(table.width) == [0] * 4
    except ShardError:
        pass
    else:
        assert found == good
    finally:
        Path(str(path) + SUFFIX).unlink()


def test_indexes_can_lie_in_a_folder_of_their_own(folder, tmp_path, scanned):
    paths = expand_shards(folder)
    index = load_index(paths, tmp_path / "indexes")
    assert sorted(path.name for path in (tmp_path / "indexes").iterdir()) == [
        f"00{number}.tar.index" for number in range(3)
    ]
    assert sorted(path.name for path in folder.iterdir()) == ["000.tar", "001.tar", "002.tar"]
    scanned.clear()
    assert load_index(paths, str(tmp_path / "indexes"), build=False) == index
    assert scanned == []
    with pytest.raises(ShardError, match=r"3 shards have no index .*latentae index"):
        load_index(paths, build=False)
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert load_index(expand_shards(moved), tmp_path / "indexes", build=False).digest == index.digest


def test_two_shards_of_one_name_do_not_share_an_index(folder, tmp_path, make_shards, capsys):
    other = expand_shards(make_shards(tmp_path / "other", [4]))
    with pytest.raises(ShardError, match="one name"):
        load_index([*expand_shards(folder), *other], tmp_path / "indexes")
    load_index(expand_shards(folder), tmp_path / "indexes")
    assert load_index(other, tmp_path / "indexes").samples == 4  # kept in memory, and said so
    assert "is the index of" in capsys.readouterr().err
    assert load_index([*expand_shards(folder), *other]).samples == 9


def test_where_indexes_can_not_be_written_they_stay_in_memory(folder, monkeypatch, capsys):
    def full(path):
        raise OutputError(f"could not write {path}: read-only")

    monkeypatch.setattr(index_module, "atomic_file", full)
    index = load_index(expand_shards(folder))
    assert "stay in memory" in capsys.readouterr().err
    assert everything(pickle.loads(pickle.dumps(index))) == everything(index)
    assert len(everything(index)) == 5


def test_remote_shards_need_a_folder_or_an_index_of_their_own(folder, tmp_path, memory):
    for path in expand_shards(folder):
        memory.pipe_file(f"/bucket/{Path(path).name}", Path(path).read_bytes())
    urls = [f"memory://bucket/00{number}.tar" for number in range(3)]
    with pytest.raises(ShardError, match="name that folder"):
        load_index(urls)
    index = load_index(urls, tmp_path / "indexes")
    assert index.digest == load_index(expand_shards(folder)).digest
    assert [raw["png"] for raw in everything(index)] == [
        raw["png"] for raw in everything(load_index(expand_shards(folder)))
    ]
    assert len(index.shards[0].sha256) == 64  # they were read completely
    for path in (tmp_path / "indexes").iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    found = load_index(urls, build=False)
    assert found == index
    assert everything(found) == everything(index)


def test_the_rows_of_a_remote_slice_come_in_one_request(folder, tmp_path, memory, monkeypatch, write_tar):
    path = write_tar(tmp_path / "y.tar", [(f"{number}.jpg", bytes([number]) * 1000) for number in range(100)])
    memory.pipe_file("/bucket/y.tar", path.read_bytes())
    index = load_index(["memory://bucket/y.tar"], tmp_path / "indexes")
    asked: list[tuple[int, int]] = []
    read = type(memory).cat_file
    monkeypatch.setattr(
        type(memory),
        "cat_file",
        lambda self, name, *span, **rest: asked.append(rest) or read(self, name, *span, **rest),
    )
    rows = [17, 12, 19, 10]
    assert [raw["jpg"][0] for raw in read_samples(index, 0, rows)] == rows
    table = index.table(0)
    assert asked == [{"start": table.span(10)[0], "end": table.span(19)[1]}]


def test_damaged_samples_are_refused_until_they_have_been_listed(tmp_path, write_tar, make_png, capsys):
    damaged = {"a.jpg": ["a.jpg", "a.jpg"], "'a'": ["a.jpg", "b.jpg", "a.png"], "outside": ["../a.jpg"]}
    for number, (says, names) in enumerate(damaged.items()):
        path = write_tar(tmp_path / f"{number}.tar", [("first.jpg", b"x"), *((name, b"x") for name in names)])
        with pytest.raises(ShardError, match=f"{says}.*latentae index"):
            load_index([str(path)])
        assert not Path(str(path) + SUFFIX).exists()
    # What is no part of a sample is left out, and said; latents are samples.
    others = [("dataset.json", b"{}"), ("00000/img0.png", make_png()), ("LICENSE", b""), ("b.txt", b"")]
    path = write_tar(tmp_path / "x.tar", others)
    assert load_index([str(path)]).table(0).keys() == ["00000/img0"]
    assert "1 shards contain files that are no part" in capsys.readouterr().err
    latents = write_tar(
        tmp_path / "latents.tar", [("a.latent.safetensors", b"x"), ("b.latent.safetensors", b"x")]
    )
    assert load_index([str(latents)]).table(0).keys() == ["a", "b"]


def test_missing_damaged_and_empty_shards_are_errors(tmp_path, folder, make_shards):
    with pytest.raises(ShardError, match="no samples in 2 shards"):
        load_index(expand_shards(make_shards(tmp_path / "empty", [0, 0])))
    with pytest.raises(ShardError, match="no shard"):
        load_index([str(tmp_path / "gone.tar")])
    path = folder / "000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ShardError, match=r"000\.tar is cut short"):
        load_index(expand_shards(folder))


# How img2dataset, OpenCLIP and EDM name the files of a sample, and the files of five.
STYLES = {
    "img2dataset": [f"{number:09}.{kind}" for number in range(5) for kind in ("jpg", "txt", "json")],
    "open_clip": [f"./cc3m_{number}.{kind}" for number in range(5) for kind in ("cls", "JPG", "txt")],
    "edm": ["dataset.json", *(f"{number:05}/img{number:08}.png" for number in range(5))],
}


@pytest.mark.parametrize(
    ("style", "form"),
    [("img2dataset", tarfile.USTAR_FORMAT), ("open_clip", tarfile.GNU_FORMAT), ("edm", tarfile.PAX_FORMAT)],
)
def test_tars_made_by_others_work(tmp_path, make_png, style, form):
    image = make_png(1, 20, 30)
    with tarfile.open(tmp_path / "x.tar", "w", format=form) as archive:
        for folder in sorted({name.rpartition("/")[0] for name in STYLES[style]} - {""}):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        for name in STYLES[style]:
            data = image if name.lower().endswith(("jpg", "png")) else b"{}"
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1.7e9 + 0.5, "someone"
            archive.addfile(info, io.BytesIO(data))
    index = load_index([str(tmp_path / "x.tar")])
    assert (index.samples, set(index.table(0).height)) == (5, {20})
    for raw in everything(index):
        assert image in raw.values()
        assert raw.keys() - {"jpg", "png"} >= {"__key__", "__url__"}


def test_a_large_manifest_is_small_in_memory(tmp_path, write_tar):
    """300 shards of 200 samples; the memory per shard does not depend on its samples."""
    path = write_tar(tmp_path / "first.tar", [(f"{number:06}.jpg", b"") for number in range(200)])
    load_index([str(path)])
    paths = []
    for number in range(300):
        for suffix in ("", SUFFIX):
            os.link(str(path) + suffix, tmp_path / f"{number:05}.tar{suffix}")
        paths.append(str(tmp_path / f"{number:05}.tar"))
    tracemalloc.start()
    index = load_index(paths, build=False)
    held = tracemalloc.get_traced_memory()[0]
    for number in range(len(paths)):
        assert index.table(number).samples == 200
    more = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    assert held / len(paths) < 1500  # bytes; 10 000 shards of 10 000 samples: 15 MB
    assert more / OPEN_TABLES < 20_000
    if Path("/proc/self/fd").is_dir():
        assert len(list(Path("/proc/self/fd").iterdir())) < 64 + OPEN_TABLES + 100
