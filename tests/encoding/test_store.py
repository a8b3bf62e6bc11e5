from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import uuid
from itertools import count
from pathlib import Path

import fsspec
import pytest

from latentae.encoding import store as store_module
from latentae.encoding.store import LocalStore, Store, open_store
from latentae.errors import LatentAEError, MissingDependencyError, OutputError
from latentae.files import atomic_file

DATA = bytes(range(256)) * 3000


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WAITS", (0.0, 0.0))


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path / "out" if request.param == "disk" else f"memory://{uuid.uuid4().hex}/out")


@pytest.fixture
def remote() -> Store:
    return open_store(f"memory://{uuid.uuid4().hex}/out")


def everything(store: Store) -> list[str]:
    """All files of a remote store, those on their way too."""
    fs, root = fsspec.core.url_to_fs(store.url)  # pyright: ignore[reportAttributeAccessIssue]
    return sorted(path.removeprefix(f"{root}/") for path in fs.find(root))


def test_files_come_back(store: Store) -> None:
    assert sorted(store.sizes()) == []
    with store.write("deep/er/a.tar") as path:
        path.write_bytes(DATA)
    store.write_bytes("b.json", b"{}")
    store.write_bytes("b.json", b"[1]")  # replaced whole
    assert sorted(store.sizes()) == ["b.json", "deep/er/a.tar"]
    assert store.sizes() == {"b.json": 3, "deep/er/a.tar": len(DATA)}
    assert store.read("b.json") == b"[1]"
    assert store.size("deep/er/a.tar") == len(DATA)
    again = pickle.loads(pickle.dumps(store))
    assert (again.read("b.json"), again.shown) == (b"[1]", store.shown)
    store.remove("b.json")
    store.remove("b.json")
    assert sorted(store.sizes()) == ["deep/er/a.tar"]


def test_what_is_not_there(store: Store) -> None:
    store.write_bytes("there", b"")
    for name in ("a.tar", "deep/a.tar", "there/below"):
        assert store.read(name) is None
        assert store.size(name) is None
        store.remove(name)
    assert store.read("there") == b""


@pytest.mark.parametrize("name", ["/etc/x", "../x", "a/../../x", "a//b", "", "./a", "a\\b"])
def test_names_stay_inside(store: Store, name: str) -> None:
    with pytest.raises(OutputError, match="is no valid file name"):
        store.write_bytes(name, b"x")
    with pytest.raises(OutputError, match="is no valid file name"), store.write(name):
        pass
    with pytest.raises(OutputError, match="is no valid file name"):
        store.size(name)


def test_a_failed_writer_leaves_nothing(store: Store) -> None:
    store.write_bytes("a", b"before")
    with pytest.raises(RuntimeError, match="boom"), store.write("a") as path:
        path.write_bytes(b"half")
        raise RuntimeError("boom")
    with pytest.raises(KeyboardInterrupt), store.write("new/b") as path:
        path.write_bytes(b"half")
        raise KeyboardInterrupt
    assert store.read("a") == b"before"
    assert sorted(store.sizes()) == ["a"]
    if isinstance(store, LocalStore):
        assert [path.name for path in store.folder.rglob("*") if path.is_file()] == ["a"]
    else:
        assert everything(store) == ["a"]


def test_job(store: Store) -> None:
    job = store.claim("encode", {"model": "a"}, {"model_path": "/m"})
    assert job.state == "new"
    assert store.claim("encode", {"model": "a"}).state == "resumed"
    pickle.loads(pickle.dumps(job)).finish(samples=3)
    again = store.claim("encode", {"model": "a"})
    assert (again.state, again.notes) == ("finished", {"model_path": "/m"})
    assert store.record()["samples"] == 3
    again.reopen()
    assert not store.record()["finished"]
    assert store.record()["notes"] == {"model_path": "/m"}
    with pytest.raises(OutputError, match="model was 'a' and is now 'b'"):
        store.claim("encode", {"model": "b"})
    with pytest.raises(OutputError, match="not by train"):
        store.claim("train", {"model": "a"})


def test_foreign_folder_is_refused(store: Store) -> None:
    with pytest.raises(OutputError, match="damaged or not of latentae"):
        store.record()
    store.write_bytes("thesis.txt", b"x")
    with pytest.raises(OutputError, match=r"already contains thesis\.txt"):
        store.claim("encode", {})
    store.write_bytes("latentae.json", b"not json")
    with pytest.raises(OutputError, match="damaged or not of latentae"):
        store.claim("encode", {})
    store.write_bytes("latentae.json", json.dumps({"format_version": 99}).encode())
    with pytest.raises(OutputError, match="newer or unknown format"):
        store.claim("encode", {})


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    local = open_store(f"file://{tmp_path}/out")
    assert isinstance(local, LocalStore)
    assert local.folder == tmp_path / "out"
    assert local.address("a") == str(tmp_path / "out/a")
    assert local.shown == str(tmp_path / "out")
    with pytest.raises(OutputError, match="a scheme that fsspec knows"):
        open_store("nosuchscheme://user:secret@bucket/out")
    with pytest.raises(LatentAEError, match="would run a program"):
        open_store("pipe:cat")
    remote = open_store("memory://user:secret@bucket/out")
    assert remote.shown == "memory://bucket/out"
    assert "secret" not in remote.show("a")
    assert remote.address("a") == "memory://user:secret@bucket/out/a"

    def fail(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fail)
    with pytest.raises(MissingDependencyError, match="Install s3fs"):
        open_store("s3://bucket/out")


class Broken:
    """Makes the first calls of an operation of the memory file system fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
        self.monkeypatch = monkeypatch
        self.fs = fsspec.core.url_to_fs(store.url)[0]  # pyright: ignore[reportAttributeAccessIssue]

    def fail(self, name: str, error: Exception, times: int) -> None:
        plain, calls = getattr(self.fs, name), count()

        def broken(*arguments, **options):
            if next(calls) < times:
                raise error
            return plain(*arguments, **options)

        self.monkeypatch.setattr(self.fs, name, broken)

    def half(self, name: str, times: int, error: Exception | None) -> None:
        """Half of the bytes arrive; without an error nobody is told."""
        plain, calls = getattr(self.fs, name), count()

        def broken(source, target, **options):
            if next(calls) >= times:
                return plain(source, target, **options)
            if name == "put_file":
                data = Path(source).read_bytes()
                self.fs.pipe_file(target, data[: len(data) // 2])
            else:  # (path, value)
                plain(source, target[: len(target) // 2])
            if error is not None:
                raise error

        self.monkeypatch.setattr(self.fs, name, broken)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, remote: Store) -> Broken:
    return Broken(monkeypatch, remote)


def put(store: Store, how: str) -> None:
    if how == "pipe_file":
        store.write_bytes("deep/a", DATA)
    else:
        with store.write("deep/a") as path:
            path.write_bytes(DATA)


@pytest.mark.parametrize("how", ["put_file", "pipe_file"])
@pytest.mark.parametrize("direct", [False, True])
def test_uploads_are_tried_again_and_silent_damage_is_noticed(
    remote: Store, monkeypatch, how: str, direct: bool
) -> None:
    monkeypatch.setattr(
        fsspec.get_filesystem_class("memory"), "async_impl", direct
    )  # before fsspec makes one
    broken = Broken(monkeypatch, remote)
    for error, times in ((ConnectionError("reset half way"), 2), (None, 1)):
        broken.half(how, times, error)
        put(remote, how)
        assert remote.read("deep/a") == DATA
        assert everything(remote) == ["deep/a"]
        remote.remove("deep/a")
    broken.half(how, 10**9, None)
    with pytest.raises(OutputError, match="came back with other bytes"):
        put(remote, how)
    assert everything(remote) == []


def test_a_dead_upload_leaves_nothing(remote: Store, broken: Broken) -> None:
    remote.write_bytes("deep/a", b"before")
    broken.half("put_file", 10**9, ConnectionError("gone"))
    with pytest.raises(OutputError, match=r"could not write deep/a at memory://.*\(gone\) in 3 tries"):
        put(remote, "put_file")
    assert everything(remote) == ["deep/a"]
    assert remote.read("deep/a") == b"before"


@pytest.mark.parametrize(
    ("error", "tries"), [(FileNotFoundError("no such bucket"), 3), (PermissionError("read only"), 1)]
)
def test_a_missing_bucket_is_no_success_and_no_access_is_said_at_once(
    remote, broken, error: OSError, tries: int
) -> None:
    broken.fail("put_file", error, 10**9)
    with pytest.raises(OutputError, match=rf"\({error}\) in {tries} tries"):
        put(remote, "put_file")


@pytest.mark.parametrize("operation", ["cat_file", "info", "find", "rm_file"])
def test_reads_are_tried_again(remote: Store, broken: Broken, operation: str) -> None:
    remote.write_bytes("a", b"x")
    call = {
        "cat_file": remote.read,
        "info": remote.size,
        "find": lambda _: sorted(remote.sizes()),
        "rm_file": remote.remove,
    }[operation]
    expected = {"cat_file": b"x", "info": 1, "find": ["a"], "rm_file": None}[operation]
    broken.fail(operation, TimeoutError("slow"), 2)
    assert call("a") == expected
    broken.fail(operation, TimeoutError("slow"), 10**9)
    with pytest.raises(OutputError, match="slow"):
        call("a")


def test_unreadable_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"could not read .*folder"):
        store.read("folder")
    with pytest.raises(OutputError, match=r"could not remove .*folder"):
        store.remove("folder")

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.scandir", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        sorted(store.sizes())


def test_full_disk(store: Store, largest_file) -> None:
    store.write_bytes("small", b"x" * 1000)
    with largest_file(100_000):
        with (
            pytest.raises(OutputError, match=r"could not write .*File too large") as caught,
            store.write("big") as path,
        ):
            path.write_bytes(DATA)
        assert "\n" not in str(caught.value)
        assert sorted(store.sizes()) == ["small"]
        store.write_bytes("big", b"z" * 10)
    if isinstance(store, LocalStore):
        assert sorted(path.name for path in store.folder.iterdir()) == ["big", "small"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    shard = tmp_path / "deep/a[0].tar"
    shard.parent.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = (
        abandoned_name(shard, gone.pid),
        abandoned_name(shard.with_name("a[0].latents-8x8.safetensors"), gone.pid),
    )
    living = abandoned_name(shard, os.getpid()), shard.with_name(".a[0].tar.elsewhere.7.incomplete")
    old = shard.with_name(".b.tar.elsewhere.8.incomplete")
    for path in (shard, *here, *living, old):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    store.remove_leftovers()
    assert sorted(shard.parent.iterdir()) == sorted([shard, *living])
    open_store("memory://bucket/out").remove_leftovers()


def abandoned_name(path: Path, process: int) -> Path:
    """What `path` would be called while that process of this machine writes it."""
    with atomic_file(path) as temporary:
        temporary.touch()
    path.unlink()
    return temporary.with_name(temporary.name.replace(f".{os.getpid()}.", f".{process}."))
