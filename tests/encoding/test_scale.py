"""Many shards: memory does not grow with them. The network is a stub and the images are tiny."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from latentae.data.shard_index import load_index
from latentae.encoding.options import EncodeOptions
from latentae.encoding.plan import ShardSettings, find_finished, plan_shards
from latentae.encoding.shard_encoder import encode_shards
from latentae.encoding.store import open_store
from latentae.models.latent_statistics import LatentStatistics, merge

SIDE = 4
SHARDS = 2000
STATUS = Path("/proc/self/status")


def tiny_shard(path: Path, first: int, count: int) -> None:
    """`count` PPM images of 4 x 4 pixels; the corner's colour is the number of the sample."""
    parts = []
    for number in range(first, first + count):
        image = b"P6 4 4 255\n" + number.to_bytes(3, "big") + bytes(45)
        header = tarfile.TarInfo(f"{number:07}.ppm")
        header.size = len(image)
        parts += [header.tobuf(tarfile.USTAR_FORMAT), image.ljust(512, b"\0")]
    path.write_bytes(b"".join(parts) + bytes(1024))


def stub(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The corner pixel is the latent's mean, of [3, 1, 1]; sigma is 1."""
    mean = images[:, :, 0, 0].float().reshape(-1, 3, 1, 1)
    return mean, torch.zeros_like(mean)


def resident() -> int:
    """Bytes that this process holds."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="reads memory from /proc")
def test_memory_stays_flat_over_thousands_of_shards(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for number in range(SHARDS):
        tiny_shard(images / f"{number:05}.tar", 2 * number, 2)
    index = load_index(sorted(map(str, images.glob("*.tar"))))
    plan, store = plan_shards(index), open_store(tmp_path / "out")
    options = EncodeOptions("model", images, tmp_path / "out", dtype="fp32", batch_size=64, packed=True)
    settings = ShardSettings(options, "stub", ((SIDE, SIDE),), 3, 3, workers=1)
    held = [resident() for _ in encode_shards(iter(plan), store, stub, settings)]
    found = [sidecar for _, sidecar in find_finished(store, plan, "stub", store.sizes()) if sidecar]
    total = merge((LatentStatistics.from_json(sidecar.statistics) for sidecar in found), 3)
    assert (len(held), len(found), total.samples) == (SHARDS, SHARDS, 2 * SHARDS)
    early, late = max(held[300:600]), max(held[1800:])
    assert late - early < 6 << 20, f"{(late - early) / 2**20:.1f} MiB more after 1400 more shards"
