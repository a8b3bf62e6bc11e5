"""One shard of images in, one shard of latents out: streamed, in order, whole or not there at all.

A sample `KEY.jpg, KEY.txt` becomes

    KEY.latent.safetensors   mean, logvar [z, h, w], raw (no scaling), in the stored type
    KEY.latent.json          what the image was, and which part of it the latent shows
    KEY.txt                  byte for byte, as is every member but the image (KEY.jpg too when images are kept); extensions
                             become lower case, as WebDataset reads them

Batches never cross a shard and the last one is padded to full size, so a shard's bytes depend on its input, the model and
the batch size alone. Tar headers carry no time, owner or machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from latentae.data.decode import decode_sample, image_extension
from latentae.data.shards import read_shard
from latentae.data.transforms import resize_and_center_crop
from latentae.encoding.sidecar import ShardFile, Sidecar, sidecar_path, write_sidecar
from latentae.errors import ShardError
from latentae.files import atomic_file, sha256
from latentae.models.latent_statistics import LatentStatistics

__all__ = ["DTYPES", "JSON_MEMBER", "LATENT_MEMBER", "Encoder", "ShardSettings", "encode_shard"]

LATENT_MEMBER, JSON_MEMBER = "latent.safetensors", "latent.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NON_FINITE = "non-finite latent"

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 images [B, 3, R, R] -> mean and logvar, fp32 on the CPU, [B, z, h, w]."""


@dataclass(frozen=True)
class ShardSettings:
    """What is the same for every shard of a job."""

    resolution: int
    """Side in pixels of the square that is encoded."""
    dtype: str
    """Stored type, one of DTYPES."""
    batch_size: int
    keep_images: bool
    channels: int
    """Latent channels, z."""
    fingerprint: str


@dataclass(frozen=True)
class _Source:
    """A decoded sample on its way to the encoder."""

    key: str
    members: dict[str, bytes]
    """What goes to the output unchanged."""
    image: Tensor
    """uint8 [3, R, R]."""
    info: dict[str, Any]


@dataclass
class _Tally:
    """What one shard's sidecar will say."""

    statistics: LatentStatistics
    read: int = 0
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def encode_shard(
    source: str | Path, output: Path, name: str, encoder: Encoder, settings: ShardSettings, advance: Callable[[int], None]
) -> Sidecar:
    """Encode the shard `source` to `output`, vouch for it with a sidecar, and return that.

    Args:
        source: tar of images.
        output: tar of latents.
        name: what the sidecar calls the output.
        encoder: the model.
        settings: see ShardSettings.
        advance: called with the number of samples of each batch done.

    Raises:
        ShardError: `source` is damaged or already holds latents.
        ImageError: an image is missing or can't be read; shard and key are named.
        OutputError: `output` can't be written.
    """
    sidecar_path(output).unlink(missing_ok=True)  # what it vouched for is about to go
    tally = _Tally(LatentStatistics.empty(settings.channels))
    with atomic_file(output) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
            for batch in _batches(_decoded(source, settings), settings.batch_size):
                _encode_batch(batch, encoder, settings, tar, tally)
                advance(len(batch))
        written = ShardFile(samples=tally.statistics.samples, bytes=temporary.stat().st_size, sha256=sha256(temporary))
    sidecar = Sidecar(
        shard=name,
        fingerprint=settings.fingerprint,
        input=ShardFile(samples=tally.read, bytes=Path(source).stat().st_size, sha256=sha256(source)),
        output=written,
        skipped=dict(tally.skipped),
        batch_size=settings.batch_size,
        statistics=tally.statistics.to_json(),
    )
    write_sidecar(output, sidecar)
    return sidecar


def _decoded(shard: str | Path, settings: ShardSettings) -> Iterator[_Source]:
    """The samples of `shard`, decoded and cropped."""
    for raw in read_shard(shard):
        key = str(raw["__key__"])
        members = {name: value for name, value in raw.items() if not name.startswith("__")}
        if LATENT_MEMBER in members or JSON_MEMBER in members:
            raise ShardError(f"{shard}: sample {key} already holds a latent; give the shards of images")
        image = decode_sample(raw).image
        extension = str(image_extension(raw))
        square = resize_and_center_crop(image, settings.resolution)
        info = {
            "source": extension,
            "source_sha256": hashlib.sha256(members[extension]).hexdigest(),
            **_geometry(image.shape[1], image.shape[2], settings.resolution),
        }
        if not settings.keep_images:
            del members[extension]
        yield _Source(key, members, square, info)


def _geometry(height: int, width: int, resolution: int) -> dict[str, list[int]]:
    """What resize_and_center_crop did to an image, as [height, width] and, in the resized image, [top, left, height, width]."""
    short = min(height, width)
    resized = [int(resolution * height / short), int(resolution * width / short)]
    top, left = (round((side - resolution) / 2) for side in resized)
    return {"original_size": [height, width], "resized_size": resized, "crop": [top, left, resolution, resolution]}


def _batches(samples: Iterator[_Source], size: int) -> Iterator[list[_Source]]:
    batch: list[_Source] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _encode_batch(batch: list[_Source], encoder: Encoder, settings: ShardSettings, tar: tarfile.TarFile, tally: _Tally) -> None:
    side = settings.resolution
    images = torch.zeros(settings.batch_size, 3, side, side, dtype=torch.uint8)
    for row, sample in enumerate(batch):
        images[row] = sample.image
    means, logvars = encoder(images)
    dtype = DTYPES[settings.dtype]
    tally.read += len(batch)
    for sample, mean, logvar in zip(batch, means.to(dtype), logvars.to(dtype), strict=False):  # the padded tail is dropped
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            tally.skipped[NON_FINITE].append(sample.key)
            continue
        tally.statistics = tally.statistics.merge(LatentStatistics.of(mean, logvar))
        tensors = {"mean": mean.contiguous(), "logvar": logvar.contiguous()}
        _add(tar, f"{sample.key}.{LATENT_MEMBER}", safetensors_bytes(tensors))
        _add(tar, f"{sample.key}.{JSON_MEMBER}", json.dumps(sample.info).encode())
        for extension, data in sample.members.items():
            _add(tar, f"{sample.key}.{extension}", data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    header = tarfile.TarInfo(name)  # time, owner and group are zero or empty from the start, the mode is 0644
    header.size = len(data)
    tar.addfile(header, io.BytesIO(data))
