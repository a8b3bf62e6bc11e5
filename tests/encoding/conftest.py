from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import AutoencoderKLConfig

RESOLUTION = 32


def jpeg(seed: int, height: int, width: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname = len(data), 1_700_000_000, 1000, "someone"
            tar.addfile(info, io.BytesIO(data))


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def image_shard(path: Path, first: int, count: int) -> None:
    """`count` photos of various shapes, each with a caption and a member that no one knows."""
    members: dict[str, bytes] = {}
    for number in range(first, first + count):
        key = f"photos/{number:04}"
        members[f"{key}.jpg"] = jpeg(number, 40 + 7 * (number % 5), 36 + 11 * (number % 3))
        members[f"{key}.txt"] = f"a photo, número {number}\r\n".encode()
        members[f"{key}.seg.bin"] = bytes(range(number % 256)) + b"\0\xff"
    write_tar(path, members)


def make_model(folder: Path, seed: int) -> Path:
    config = AutoencoderKLConfig(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=3,
        mid_block_add_attention=False,
        sample_size=RESOLUTION,
    )
    torch.manual_seed(seed)
    AutoencoderKL(config).save_pretrained(folder)
    return folder


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of 5, 1, 0 and 6 photos."""
    folder = tmp_path_factory.mktemp("photos")
    for number, (first, count) in enumerate([(0, 5), (5, 1), (6, 0), (6, 6)]):
        image_shard(folder / f"train-{number:03}.tar", first, count)
    return folder


@pytest.fixture(scope="session")
def encoded(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as latents, in one uninterrupted run. Not to be changed."""
    from latentae import encode

    out = tmp_path_factory.mktemp("latents") / "out"
    assert encode(model, photos, out, dtype="fp32", batch_size=4, device="cpu")["finished"]
    return out


@pytest.fixture(scope="session")
def kept(model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos as packed latents, with flips and images. Not to be changed."""
    from latentae import encode

    out = tmp_path_factory.mktemp("kept") / "out"
    encode(
        model, photos, out, dtype="fp32", batch_size=4, device="cpu", packed=True, flip=True, keep_images=True
    )
    return out


@pytest.fixture
def largest_file(capsys: pytest.CaptureFixture[str]) -> Callable[[int], AbstractContextManager[None]]:
    """`with largest_file(size):` limits files to that many bytes, as on a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(name="jpeg", scope="session")
def _jpeg() -> Callable[[int, int, int], bytes]:
    return jpeg


@pytest.fixture(name="write_tar", scope="session")
def _write_tar() -> Callable[[Path, Mapping[str, bytes]], None]:
    return write_tar


@pytest.fixture(name="read_tar", scope="session")
def _read_tar() -> Callable[[Path], dict[str, bytes]]:
    return read_tar


@pytest.fixture(name="make_model", scope="session")
def _make_model() -> Callable[[Path, int], Path]:
    return make_model


@pytest.fixture(name="snapshot", scope="session")
def _snapshot() -> Callable[[Path], dict[str, bytes]]:
    return snapshot
