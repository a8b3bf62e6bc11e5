from __future__ import annotations

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentae import cli
from latentae.data import index as indexing
from latentae.data import remote, shard_index
from latentae.data.index import index
from latentae.data.remote import Patience
from latentae.data.shard_files import expand_shards, read_samples
from latentae.data.shard_index import SUFFIX, load_index
from latentae.errors import LatentAEError, OutputError, RecipeError, ShardError
from latentae.files import sha256


@pytest.fixture
def folder(tmp_path, make_shards):
    return Path(make_shards(tmp_path / "shards", [3, 0, 2, 4]))


@pytest.fixture
def mixed(folder, write_tar, make_png):
    """Complete shards, a cut one, a web page, and one with every type of damaged sample."""
    (folder / "cut.tar").write_bytes((folder / "003.tar").read_bytes()[:3000])
    (folder / "page.tar").write_text("<html>not found</html>")
    files = [
        ("a.png", make_png(1)),
        ("a.png", b"x"),
        ("b.jpg", b"<html>not found</html>"),
        ("../c.jpg", b"x"),
        ("d.txt", b"x"),
    ]
    write_tar(folder / "odd.tar", [*files, ("e.jpg", b""), ("f.png", make_png(2)), ("a.txt", b"again")])
    return folder


def samples(summary) -> int:
    return sum(shard.samples for shard in summary.index.shards)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_shard_gets_its_index_and_its_hash(folder, capsys):
    quick = load_index(expand_shards(folder))
    assert quick.shards[0].sha256 == ""
    summary = index(folder)
    assert summary.index == quick  # by headers alone: the order of training does not change
    assert (summary.damaged, samples(summary), len(summary.index.shards)) == (0, 9, 4)
    assert "4 shards indexed, 9 samples" in capsys.readouterr().err
    assert sorted(path.name for path in folder.glob("*.index")) == [
        f"00{number}.tar.index" for number in range(4)
    ]
    loaded = load_index(expand_shards(folder), build=False)
    assert loaded == summary.index
    assert [shard.sha256 for shard in loaded.shards] == [sha256(shard.path) for shard in loaded.shards]
    assert list(summary.index.table(0).height) == [12, 12, 12]


def test_damage_is_listed_and_the_rest_is_indexed(mixed, tmp_path, capsys):
    out = tmp_path / "indexes"
    with pytest.raises(LatentAEError):  # training does not begin on what was not listed
        load_index(expand_shards(mixed))
    summary = index(mixed, out, workers=2)
    rows = [json.loads(line) for line in (out / "damaged.jsonl").read_text().splitlines()]
    assert [(Path(row["shard"]).name, row["level"], row["name"]) for row in rows] == [
        ("cut.tar", "damaged shard", ""),
        ("odd.tar", "damaged sample", "a.png"),
        ("odd.tar", "damaged sample", "../c.jpg"),
        ("odd.tar", "bad image", "b"),
        ("odd.tar", "left out", "d"),
        ("odd.tar", "bad image", "e"),
        ("odd.tar", "damaged sample", "a"),
        ("page.tar", "damaged shard", ""),
    ]
    assert all(row["reason"] for row in rows)
    assert summary.counts == {"damaged shard": 2, "damaged sample": 3, "bad image": 2, "left out": 1}
    assert summary.damaged == 7
    assert [shard.name for shard in summary.index.shards] == [
        "000.tar",
        "001.tar",
        "002.tar",
        "003.tar",
        "odd.tar",
    ]
    assert summary.index.table(4).keys() == ["a", "b", "e", "f"]
    manifest = json.loads((out / "index.json").read_text())
    assert (manifest["digest"], manifest["samples"]) == (summary.index.digest, 13)
    assert [row["name"] for row in manifest["shards"]] == [shard.name for shard in summary.index.shards]
    printed = capsys.readouterr().err
    assert "cut short" in printed
    assert "'../c.jpg'" in printed
    # what was listed may be used: the complete samples
    usable = [path for path in expand_shards(mixed) if Path(path).name not in ("cut.tar", "page.tar")]
    assert load_index(usable, out, build=False) == summary.index


def test_the_command_fails_where_something_is_damaged(mixed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["index", str(mixed), str(tmp_path / "out"), "--workers", "1"])
    assert stop.value.code == 1
    assert "error: damage found: 5 shards indexed" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["index", f"{mixed}/00*.tar"])
    assert not stop.value.code


def test_a_second_run_reads_nothing_and_reports_the_same_with_any_number_of_workers(
    mixed, tmp_path, monkeypatch
):
    first = index(mixed, tmp_path / "out", workers=1)
    before = contents(tmp_path / "out")
    index(mixed, tmp_path / "again", workers=3)
    assert contents(tmp_path / "again") == before
    scanned: list[str] = []
    scan = indexing.scan
    monkeypatch.setattr(
        indexing, "scan", lambda path, **rest: scanned.append(Path(path).name) or scan(path, **rest)
    )
    again = index(mixed, tmp_path / "out")
    assert (again.findings, again.counts, again.index) == (first.findings, first.counts, first.index)
    assert sorted(scanned) == ["cut.tar", "page.tar"]
    assert contents(tmp_path / "out") == before
    with pytest.raises(RecipeError, match="workers"):
        index(mixed, workers=0)


def test_changed_shards_are_found(folder, capsys):
    index(folder)
    path = folder / "003.tar"
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    assert index(folder).damaged == 0  # headers and size fit
    before = contents(folder)
    summary = index(folder, verify=True)
    assert summary.counts == {"changed shard": 1}
    assert "003.tar" in summary.findings[0].shard
    assert contents(folder) == before
    assert "SHA-256" in capsys.readouterr().err
    Path(f"{path}{SUFFIX}").unlink()
    assert index(folder, verify=True).damaged == 0
    (folder / "000.tar").write_bytes(path.read_bytes())  # another size is seen without reading all
    assert samples(index(folder)) == 10
    assert "000.tar no longer fits" in capsys.readouterr().err


def test_more_than_a_screen_of_findings_is_cut_and_counted(tmp_path, write_tar, capsys):
    write_tar(tmp_path / "x.tar", [(f"{number}.jpg", b"no image") for number in range(1200)])
    summary = index(tmp_path, tmp_path / "out")
    assert summary.counts == {"bad image": 1200}
    assert len(summary.findings) == 1000
    printed = capsys.readouterr().err
    assert printed.count("bad image '") == 20
    assert "1200 bad images" in printed


KILLED = """
import sys, time
from latentae.data import index as indexing, tables
slow = tables.image_size
def image_size(*words):
    time.sleep(0.02)
    return slow(*words)
tables.image_size = image_size
indexing.index(sys.argv[1], sys.argv[2], workers=2)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_indexer_goes_on_where_it_was(tmp_path, make_shards):
    folder = make_shards(tmp_path / "shards", [5] * 12)
    out = tmp_path / "out"
    for _ in range(2):
        there = len(list(out.glob("*.index")))
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, folder, str(out)], stderr=subprocess.DEVNULL
        )
        while len(list(out.glob("*.index"))) < there + 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.index")}
    assert 6 <= len(done) < 12
    (out / ".x.tar.index.elsewhere.1.incomplete").write_text("old")
    os.utime(out / ".x.tar.index.elsewhere.1.incomplete", (0, 0))
    assert samples(index(folder, out)) == 60
    index(folder, tmp_path / "clean")
    assert contents(out) == contents(tmp_path / "clean")
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done


def test_ctrl_c_ends_it_soon_and_keeps_what_is_done(folder, monkeypatch):
    started = threading.Event()
    scan = indexing.scan

    def slow(path, *, stop, **rest):
        started.set()
        stop.wait(20)
        return scan(path, stop=stop, **rest)

    monkeypatch.setattr(indexing, "scan", slow)
    monkeypatch.setattr(
        shard_index,
        "wait",
        lambda *arguments, **rest: started.wait(5) and (_ for _ in ()).throw(KeyboardInterrupt),
    )
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        index(folder, workers=1)
    assert time.monotonic() - start < 5
    assert not list(folder.glob("*.index"))


def test_shards_on_a_failing_server_are_indexed_and_read(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        remote, "patience", Patience(seconds=60, first=0.01, longest=0.05, silence=0.2, slowest=1e9)
    )
    server.files = {f"/s/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
    spec = f"{server.url}/s/{{000..003}}.tar"
    with pytest.raises(OutputError, match="latentae index SHARDS OUT"):
        index(spec)
    server.faults.extend([503, None, ("cut", 700), ("stall", 100), 500, None, ("cut", 0)] * 2)
    summary = index(spec, tmp_path / "out", workers=2)
    local = index(folder).index
    assert summary.damaged == 0
    assert summary.index.digest == local.digest
    assert [shard.sha256 for shard in summary.index.shards] == [shard.sha256 for shard in local.shards]
    loaded = load_index(expand_shards(spec), tmp_path / "out", build=False)
    server.faults.extend([502, ("cut", 900), "whole"])
    for number in range(4):
        rows = list(range(loaded.shards[number].samples))
        found = [{**raw, "__url__": ""} for raw in read_samples(loaded, number, rows)]
        assert found == [{**raw, "__url__": ""} for raw in read_samples(local, number, rows)]


def test_a_remote_shard_that_can_not_be_had_is_not_damaged_and_one_that_changes_is_noticed(
    server, folder, tmp_path
):
    server.files = {f"/s/{path.name}": path.read_bytes() for path in folder.glob("*.tar")} | {
        "/s/cut.tar": b"x" * 2000
    }
    urls = [f"{server.url}/s/{name}.tar" for name in ("000", "none", "cut")]
    summary = index(urls, tmp_path / "out")
    assert summary.counts == {"unread shard": 1, "damaged shard": 1}
    assert len(summary.index.shards) == 1
    server.files["/s/x.tar"] = (folder / "003.tar").read_bytes()
    url = f"{server.url}/s/x.tar"
    loaded = index(url, tmp_path / "out").index
    changed = bytearray(server.files["/s/x.tar"])
    changed[0:4] = b"s7/0"
    server.files["/s/x.tar"] = bytes(changed)
    with pytest.raises(ShardError, match="has changed"):
        list(read_samples(loaded, 0, [0]))
    server.files["/s/x.tar"] = (folder / "000.tar").read_bytes() + bytes(10240)
    with pytest.raises(ShardError, match="no index that fits"):
        load_index([url], tmp_path / "out", build=False)


exploded: list[bool] = []


def explode() -> None:
    exploded.append(True)


class Bomb:
    def __reduce__(self):
        return (explode, ())


KNOWN = (
    "a.jpg",
    "a.png",
    "b.jpg",
    "c.png",
    "d/e.jpg",
    "a.pyd",
    "a.pth",
    "b.pkl",
    "a.txt",
    "../x.jpg",
    "/etc/x.jpg",
    ".jpg",
    "README",
)
names = st.one_of(st.sampled_from(KNOWN), st.text("ab./_\n", min_size=1, max_size=6))


pickle.loads(pickle.dumps(Bomb()))
assert exploded.pop(), "a pickle in a tar would run if it were loaded"


class Tar(bytes):
    def __repr__(self) -> str:
        return f"{len(self)} bytes of tar"


@st.composite
def tars(draw, make_png) -> Tar:
    """A tar as chance makes it, cut, tampered with or joined to another one now and then."""
    bodies = st.sampled_from(
        [b"", b"<html>not found</html>", pickle.dumps(Bomb()), make_png(1), make_png(2, 1, 1)]
    )
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=draw(st.sampled_from([0, 1, 2]))) as archive:
        for name in draw(st.lists(names, max_size=8)):
            info = tarfile.TarInfo(name)
            others = [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
            kind = draw(st.sampled_from([tarfile.REGTYPE] * 6 + others))
            info.type, info.linkname = kind, "/etc/passwd"
            body = draw(bodies) if kind == tarfile.REGTYPE else b""
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    content = bytearray(file.getvalue())
    fault = draw(st.sampled_from(["none", "none", "cut", "flip", "join"]))
    if fault == "cut":
        del content[draw(st.integers(0, len(content))) :]
    elif fault == "flip":
        content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    elif fault == "join":
        content *= 2
    return Tar(content)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_whatever_a_shard_holds_nothing_crashes_runs_or_gets_lost(tmp_path_factory, make_png, data):
    path = tmp_path_factory.getbasetemp() / "fuzzed.tar"
    path.write_bytes(data.draw(tars(make_png)))
    Path(f"{path}{SUFFIX}").unlink(missing_ok=True)
    summary = index(str(path))
    if summary.index is None:
        assert [finding.level for finding in summary.findings] == ["damaged shard"]
        with pytest.raises(ShardError):
            load_index([str(path)])
        return
    table = summary.index.table(0)
    read = list(read_samples(summary.index, 0, range(table.samples)))
    assert not exploded
    assert [raw["__key__"] for raw in read] == table.keys()
    assert len(set(table.keys())) == table.samples
    assert not any({"pyd", "pth", "pkl"} & raw.keys() for raw in read)
    # every member but folders is in a sample, or listed, or in a sample that is listed
    listed = {finding.name for finding in summary.findings if finding.level != "bad image"}
    used = {
        f"{table.key(row)}.{extension}"
        for row in range(table.samples)
        for extension, _, _ in table.members(row)
    }
    with tarfile.open(path) as archive:
        for member in archive:
            key = (
                member.name.rpartition("/")[0]
                + "/" * ("/" in member.name)
                + member.name.rpartition("/")[2].partition(".")[0]
            )
            assert member.isdir() or member.name in used or member.name in listed or key in listed, (
                member.name
            )


def test_indexing_does_not_wait_for_torch():
    code = "import sys, latentae.data.index; assert not {'torch', 'fsspec', 'webdataset'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
