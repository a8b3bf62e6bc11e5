from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from pathlib import Path

import pytest

from latentae.data import remote, sources
from latentae.data.remote import Patience
from latentae.data.shard_files import expand_shards, read_shard, shard_keys
from latentae.data.sources import is_remote, name_of, read_range, shown, size_of, sizes_of, stream
from latentae.errors import MissingDependencyError, ShardError

DATA = bytes(range(256)) * 4000  # about 1 MB


@pytest.fixture
def server(server):
    server.files = {"/a/data.tar": DATA}
    return server


def whole(path: str, count: int = 100_000) -> bytes:
    with stream(path) as file:
        return b"".join(iter(lambda: file.read(count), b""))


def test_a_scheme_makes_a_path_remote():
    assert all(is_remote(path) for path in ("http://x/a.tar", "s3://b/a.tar", "hf://x"))
    assert not any(is_remote(path) for path in ("/data/a.tar", "a.tar", "C://a.tar"))


def test_pipes_are_refused_everywhere():
    for use in (
        is_remote,
        size_of,
        expand_shards,
        shard_keys,
        lambda path: read_range(path, 0, 1),
        lambda path: whole(path),
    ):
        with pytest.raises(ShardError, match="run a program"):
            use("pipe:touch /tmp/no")


def test_passwords_and_signatures_are_not_shown(server):
    secret = f"http://me:password@{server.url[7:]}/a/none.tar?signature=abc"
    assert shown(secret) == f"{server.url}/a/none.tar"
    assert name_of(secret) == "none.tar"
    server.faults.extend([403])
    for _ in range(2):  # forbidden, then not found
        with pytest.raises(ShardError) as caught:
            size_of(secret)
        assert "none.tar" in str(caught.value)
        assert "password" not in str(caught.value)
        assert "abc" not in str(caught.value)


def test_local_ranges_are_exact_or_an_error(tmp_path):
    path = str(tmp_path / "data.tar")
    Path(path).write_bytes(DATA)
    assert size_of(path) == len(DATA)
    assert read_range(path, 5, 1000) == DATA[5:1000]
    assert read_range(path, 7, 7) == b""
    assert whole(path) == DATA
    with pytest.raises(ShardError, match=f"ends at byte {len(DATA)}"):
        read_range(path, len(DATA) - 5, len(DATA) + 1)
    with pytest.raises(ShardError, match="no shard"):
        read_range(str(tmp_path / "none"), 0, 1)
    with pytest.raises(ShardError, match="can't be read"):
        read_range(str(tmp_path), 0, 1)
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").replace(path)  # a file that takes the name of an open one is read
    assert read_range(path, 0, 3) == b"new"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
def test_only_so_many_files_stay_open(tmp_path):
    for number in range(3 * sources.MAX_OPEN):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(str(number).encode() * 9)
        assert read_range(str(path), 0, 2) == (str(number) * 2).encode()[:2]
    links = [link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert sum(tmp_path in link.parents for link in links) <= sources.MAX_OPEN


def test_many_threads_read_at_once(tmp_path):
    for number in range(80):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    wrong: list[int] = []

    def read(offset: int) -> None:
        found = [read_range(str(tmp_path / f"{number}.tar"), offset, 900) for number in range(80)]
        wrong.extend(number for number in range(80) if found[number] != bytes([number]) * (900 - offset))

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _read_in_child(url: str, queue) -> None:
    queue.put(read_range(url, 3, 9))


@pytest.mark.parametrize(("kind", "method"), [("local", "fork"), ("http", "fork"), ("http", "spawn")])
def test_child_processes_read_too(server, tmp_path, method, kind):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} here")
    path = f"{server.url}/a/data.tar"
    if kind == "local":
        path = str(tmp_path / "data.tar")
        Path(path).write_bytes(DATA)
    assert read_range(path, 3, 9) == DATA[3:9]  # the parent has files, a thread and a session open
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    child = context.Process(target=_read_in_child, args=(path, queue))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert queue.get() == DATA[3:9]


def test_http_ranges_and_streams_that_go_on_where_they_broke_off(server):
    url = f"{server.url}/a/data.tar"
    assert size_of(url) == len(DATA)
    assert read_range(url, 10, 5000) == DATA[10:5000]
    assert server.sent == 1 + 4990
    assert whole(url) == whole(url, 1 << 22) == DATA
    server.sent = 0
    server.faults.extend([None, ("cut", 400_000)])  # the size, then the stream
    assert whole(url) == DATA
    asked = server.requests[-1][1]
    assert asked.startswith("bytes=")
    assert int(asked[6:].partition("-")[0]) >= 100_000
    assert server.sent < 2 * len(DATA)


@pytest.mark.parametrize(
    "faults",
    [
        [500, 429, ("cut", 0), ("cut", 100_000), 408, ("cut", 5)],
        [("stall", 1000), 502, ("stall", 0), 425],
        [("cut", 200_000), "whole"],
    ],
)
@pytest.mark.parametrize("read", [whole, lambda url: read_range(url, 0, len(DATA))])
def test_passing_faults_are_survived(server, faults, read, monkeypatch):
    monkeypatch.setattr(
        remote, "patience", Patience(seconds=60, first=0.01, longest=0.05, silence=0.2, slowest=1e9)
    )
    url = f"{server.url}/a/data.tar"
    server.faults.extend([503, *faults])
    assert read(url) == DATA
    assert not server.faults


def test_a_server_without_ranges_is_read_and_complained_about(server, capsys):
    remote._warn_of_ranges.cache_clear()
    server.always = "whole"
    url = f"{server.url}/a/data.tar"
    assert size_of(url) == len(DATA)
    assert read_range(url, 700_000, 700_100) == DATA[700_000:700_100]
    assert read_range(url, 5, 9) == DATA[5:9]
    assert capsys.readouterr().err.count("does not serve ranges") == 1


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (404, "no such file"),
        (403, "HTTP 403"),
        ("shifted", "expected bytes from"),
        ("compressed", "compressed"),
    ],
)
def test_lasting_faults_are_errors_at_once(server, fault, says):
    server.always = fault
    with pytest.raises(ShardError, match=says):
        read_range(f"{server.url}/a/data.tar", 5, 10)
    assert len(server.requests) == 1


def test_a_range_beyond_the_end_and_an_unknown_size_are_errors(server):
    url = f"{server.url}/a/data.tar"
    with pytest.raises(ShardError, match="changed or was cut short"):
        read_range(url, len(DATA), len(DATA) + 10)
    with pytest.raises(ShardError, match="cut short"):
        read_range(url, 0, 10 * len(DATA))
    server.always = "unsized"
    with pytest.raises(ShardError, match="does not report"):
        size_of(url)
    server.always, server.files["/a/data.tar"] = None, b""
    assert size_of(url) == 0


@pytest.mark.parametrize("fault", [503, ("cut", 10), ("stall", 0), ("trickle", 1), "gone"])
def test_a_server_that_never_recovers_is_an_error_in_time(server, fault, monkeypatch):
    monkeypatch.setattr(
        remote, "patience", Patience(seconds=0.5, first=0.01, longest=0.05, silence=0.2, slowest=1e9)
    )
    server.always = fault
    if fault == "gone":
        server.close()
    start = time.monotonic()
    with pytest.raises(ShardError, match=r"could not read .*127.0.0.1.* tries") as caught:
        read_range(f"{server.url}/a/data.tar", 0, 100_000)
    assert time.monotonic() - start < 10, "a stalled server would take 20 s"
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingDependencyError, match="aiohttp"):
        size_of("http://127.0.0.1/x.tar")
    with pytest.raises(ShardError, match="scheme"):
        size_of("nonsense://x.tar")


def test_sizes_of_many_files_come_from_one_listing(server, memory, tmp_path, monkeypatch):
    for number in range(40):
        memory.pipe_file(f"/bucket/a/{number:03}.tar", DATA[:number])
    memory.pipe_file("/bucket/b/x.tar", DATA)
    (tmp_path / "near.tar").write_bytes(b"abc")
    server.files = {"/far.tar": DATA}
    urls = [f"memory://bucket/a/{number:03}.tar" for number in reversed(range(40))]
    asked, real = [], type(memory).info
    monkeypatch.setattr(
        type(memory), "info", lambda self, path, **rest: asked.append(path) or real(self, path, **rest)
    )
    found = sizes_of([*urls, "memory://bucket/b/x.tar", str(tmp_path / "near.tar"), f"{server.url}/far.tar"])
    assert found == [*reversed(range(40)), len(DATA), 3, len(DATA)]
    assert not any("/a/" in path for path in asked)
    with pytest.raises(ShardError, match="no such file"):
        sizes_of([*urls, "memory://bucket/a/none.tar"])


def test_other_file_systems_are_read_through_fsspec_and_asked_again_too(memory, monkeypatch):
    memory.pipe_file("/bucket/data.tar", DATA)
    assert size_of("memory://bucket/data.tar") == len(DATA)
    assert whole("memory://bucket/data.tar") == DATA
    with pytest.raises(ShardError, match="no such file"):
        read_range("memory://bucket/none.tar", 0, 5)
    monkeypatch.setattr(remote, "patience", Patience(first=0.01))
    original, calls = type(memory).cat_file, []

    def flaky(self, path, start=None, end=None, **rest):
        calls.append((start, end))
        if len(calls) == 1:
            raise OSError("connection reset")
        return original(self, path, start, end, **rest)[: 10_000 if len(calls) == 2 else None]

    monkeypatch.setattr(type(memory), "cat_file", flaky)
    assert read_range("memory://bucket/data.tar", 100, 200_000) == DATA[100:200_000]
    assert calls == [(100, 200_000), (100, 200_000), (10_100, 200_000)]


def test_remote_patterns_name_shards(server, memory):
    server.files = {f"/a/{number:03}.tar": b"" for number in range(3)} | {"/a/notes.txt": b""}
    for number in range(3):
        memory.pipe_file(f"/bucket/{number:03}.tar", b"")
    memory.pipe_file("/bucket/deep/x/1.tar", b"")
    for root in (f"{server.url}/a", "memory://bucket"):
        for spec in (root, f"{root}/", f"{root}/*.tar", f"{root}/00[0-2].tar", f"{root}/{{000..002}}.tar"):
            assert [name_of(path) for path in expand_shards(spec)] == ["000.tar", "001.tar", "002.tar"], spec
        with pytest.raises(ShardError, match="no shard matches"):
            expand_shards(f"{root}/x*.tar")
    assert [name_of(path) for path in expand_shards("memory://bucket/deep/*/*.tar")] == ["1.tar"]
    mixed = expand_shards(f"{server.url}/a/000.tar::memory://bucket/001.tar")
    assert mixed == [f"{server.url}/a/000.tar", "memory://bucket/001.tar"]
    assert size_of(expand_shards("memory://bucket/*.tar")[0]) == 0


def test_a_remote_shard_is_read_like_a_local_one(server, memory, tmp_path, write_tar):
    local = write_tar(tmp_path / "a.tar", [("d/a.jpg", b"1" * 3000), ("d/a.txt", b"2"), ("b.jpg", b"3")])
    server.files["/a/a.tar"] = local.read_bytes()
    memory.pipe_file("/bucket/a.tar", local.read_bytes())
    server.faults.extend([503, None, ("cut", 700)])
    for url in (f"{server.url}/a/a.tar", "memory://bucket/a.tar"):
        found = [{**sample, "__url__": ""} for sample in read_shard(url)]
        assert found == [{**sample, "__url__": ""} for sample in read_shard(local)]
        assert shard_keys(url) == ["d/a", "b"]
