from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flaky_server import FlakyServer
from image_files import saved

from latentae.data import remote
from latentae.data.remote import Patience

Members = list[tuple[str, bytes]]


def _png(seed: int = 0, height: int = 12, width: int = 16) -> bytes:
    return saved(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def _write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="session")
def make_png() -> Callable[..., bytes]:
    """`make_png(seed, height, width)`: the bytes of a PNG of noise."""
    return _png


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    """`write_tar(path, [(member name, bytes), ...])`."""
    return _write_tar


@pytest.fixture(scope="session")
def make_shards() -> Callable[[Path, list[int]], str]:
    """`make_shards(folder, [samples in shard 0, ...])` -> folder; keys are `s<shard>/<number>`."""

    def make(folder: Path, counts: list[int]) -> str:
        for shard, count in enumerate(counts):
            members = [(f"s{shard}/{number:03}.png", _png(1000 * shard + number)) for number in range(count)]
            _write_tar(folder / f"{shard:03}.tar", members)
        return str(folder)

    return make


@pytest.fixture
def memory():
    """fsspec's file system in memory, with the bucket `memory://bucket` of this test."""
    fs = pytest.importorskip("fsspec").filesystem("memory")
    yield fs
    if fs.exists("/bucket"):
        fs.rm("/bucket", recursive=True)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A server that fails on request, and a client that retries soon."""
    pytest.importorskip("aiohttp")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote, "patience", Patience(seconds=60, first=0.01, longest=0.05))
    running = FlakyServer()
    yield running
    running.close()
