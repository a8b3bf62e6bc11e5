"""A second writer of latent shards, from the description of the layout, to test readers with."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from latentae.encoding.sidecar import PackedFile, ShardFile, Sidecar, write_sidecar
from latentae.encoding.store import Store, open_store

FACTOR = 8
NAMES = ("mean", "logvar", "mean_flip", "logvar_flip")


@dataclass
class Made:
    key: str
    label: int | None
    bucket: tuple[int, int]
    tensors: dict[str, torch.Tensor]
    members: dict[str, bytes]
    info: dict = field(default_factory=dict)


def make_samples(
    count, first=0, *, channels=4, buckets=((32, 32),), dtype=torch.float32, flip=True, labels=3, images=False
) -> list[Made]:
    made = []
    for number in range(first, first + count):
        bucket = buckets[number % len(buckets)]
        generator = torch.Generator().manual_seed(number)
        shape = (channels, bucket[0] // FACTOR, bucket[1] // FACTOR)
        tensors = {}
        for name in NAMES[: 4 if flip else 2]:
            values = torch.randn(shape, generator=generator)
            tensors[name] = (values * 3 + 1 if "mean" in name else values - 4).to(dtype)
        original = (bucket[0] + number % 5, bucket[1] + 7)
        members = {"txt": f"caption {number}, número\r\n".encode(), "seg.bin": bytes([number % 256]) * 3}
        if labels:
            label = number % labels
            members |= (
                {"cls": str(label).encode()}
                if number % 2
                else {"json": json.dumps({"label": label, "n": number}).encode()}
            )
        if images:
            pixels = np.random.default_rng(number).integers(0, 256, (*original, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            members["png"] = file.getvalue()
        info = {
            "source": "png",
            "source_sha256": "0" * 64,
            "original_size": list(original),
            "resized_size": list(original),
            "crop": [0, 3, *bucket],
            "bucket": list(bucket),
        }
        made.append(
            Made(f"photos/{number:04}", number % labels if labels else None, bucket, tensors, members, info)
        )
    return made


def write_output(out: Path, shards: dict[str, list[Made]], *, packed=False, finished=True) -> Path:
    """An output folder of `encode` with these shards."""
    out.mkdir(parents=True)
    store = open_store(out)
    for name, samples in shards.items():
        tar, files = pack(store, name, samples, packed)
        flip = bool(samples) and "mean_flip" in samples[0].tensors
        nothing = {"samples": 0, "count": 0, "mean": [0.0], "m2": [0.0], "variance_sum": [0.0]}
        place(store, name, tar, len(samples), files, nothing, flip=flip)
    everything = [sample for samples in shards.values() for sample in samples]
    record = {
        "format_version": 1,
        "latentae": "0",
        "verb": "encode",
        "inputs": {"model": "m"},
        "finished": finished,
    }
    (out / "latentae.json").write_text(json.dumps(record))
    (out / "statistics.json").write_text(json.dumps(_statistics(everything)))
    return out


def pack(store: Store, name: str, samples: list[Made], packed: bool) -> tuple[bytes, list[PackedFile]]:
    """The tar of a shard, and with `packed` the files next to it, one per bucket."""
    members: dict[str, bytes] = {}
    stacks: dict[tuple[int, int], list[dict[str, torch.Tensor]]] = {}
    for sample in samples:
        info = dict(sample.info)
        if packed:
            info["row"] = len(stacks.setdefault(sample.bucket, []))
            stacks[sample.bucket].append(sample.tensors)
        else:
            members[f"{sample.key}.latent.safetensors"] = save(sample.tensors)
        members[f"{sample.key}.latent.json"] = json.dumps(info).encode()
        members |= {f"{sample.key}.{extension}": data for extension, data in sample.members.items()}
    files = []
    for (height, width), rows in stacks.items():
        data = save({part: torch.stack([row[part] for row in rows]) for part in rows[0]})
        file = f"{name.removesuffix('.tar')}.latents-{height}x{width}.safetensors"
        store.write_bytes(file, data)
        files.append(PackedFile(name=file, bytes=len(data), sha256=digest(data), rows=len(rows)))
    return tar_bytes(members), files


def place(
    store: Store, name: str, tar: bytes, samples: int, packed: list[PackedFile], statistics: dict, **rest
) -> Sidecar:
    """A tar and the sidecar that vouches for it, whatever it holds."""
    store.write_bytes(name, tar)
    about = ShardFile(samples=samples, bytes=len(tar), sha256=digest(tar))
    fields = {"input": about, "skipped": {}, "fingerprint": "f" * 64, "batch_size": 4, **rest}
    sidecar = Sidecar(shard=name, output=about, packed=packed, statistics=statistics, **fields)
    write_sidecar(store, sidecar)
    return sidecar


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _statistics(samples: list[Made]) -> dict:
    if not samples:
        return dict.fromkeys(("scaling_factor", "shift_factor", "latents_mean", "latents_std"))
    mean = torch.cat([sample.tensors["mean"].double().flatten(1) for sample in samples], 1)
    noise = torch.cat([sample.tensors["logvar"].double().exp().flatten(1) for sample in samples], 1)
    variance = mean.var(1, correction=0) + noise.mean(1)
    shift = mean.mean()
    overall = (variance.mean() + (mean.mean(1) - shift).square().mean()).sqrt()
    return {
        "scaling_factor": 1 / float(overall),
        "shift_factor": float(shift),
        "latents_mean": mean.mean(1).tolist(),
        "latents_std": variance.sqrt().tolist(),
    }
