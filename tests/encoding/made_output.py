"""Outputs of `encode` written from the description of the layout, to test readers with."""

from __future__ import annotations

import json
from pathlib import Path

import latent_writer
import torch
from latent_writer import digest, pack, place, tar_bytes

from latentae.encoding.plan import Shard, plan_digest
from latentae.encoding.sidecar import PackedFile, ShardFile, Sidecar
from latentae.encoding.store import open_store
from latentae.models.latent_statistics import LatentStatistics, merge

BUCKETS = [(32, 32), (24, 40)]
FACTOR, CHANNELS = 8, 3
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def latents(seed: int, bucket: tuple[int, int], dtype: str, flip: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = ["mean", "logvar", *(["mean_flip", "logvar_flip"] if flip else [])]
    shape = (CHANNELS, bucket[0] // FACTOR, bucket[1] // FACTOR)
    offset = torch.arange(CHANNELS).reshape(-1, 1, 1)
    return {name: (torch.randn(shape, generator=generator) * 2 + offset).to(DTYPES[dtype]) for name in names}


class Made:
    """An output, and what is in it."""

    def __init__(
        self, out, folder: Path, *, dtype="fp32", packed=False, flip=False, keep_images=False, **rest
    ) -> None:
        self.out, self.folder, self.store = out, folder, open_store(out)
        self.dtype, self.packed, self.flip, self.keep = dtype, packed, flip, keep_images
        self.skipped: dict[str, list[str]] = rest.get("skipped", {})
        counts = rest.get("counts", {"a.tar": 3, "deep/b.tar": 0, "deep/c.tar": 5})
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.sidecars: dict[str, Sidecar] = {}
        self.sources = {name: self._source(name, count) for name, count in counts.items()}
        plan = [
            Shard(str(path), name, counts[name] + len(self.skipped.get(name, [])), path.stat().st_size)
            for name, path in self.sources.items()
        ]
        shards = {
            "count": len(plan),
            "samples": sum(shard.samples for shard in plan),
            "digest": plan_digest(plan),
        }
        settings = {"model": "model", "resolution": 32, "dtype": dtype, "keep_images": keep_images}
        self.job = self.store.claim("encode", {**settings, "shards": shards})
        for name, count in counts.items():
            self.write(name, count)

    def key(self, name: str, number: int) -> str:
        return f"{name.removesuffix('.tar')}/{number:03}"

    def image(self, name: str, number: int) -> bytes:
        return f"image {name} {number}".encode()

    def _source(self, name: str, count: int) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        keys = [self.key(name, number) for number in range(count)] + self.skipped.get(name, [])
        path.write_bytes(
            tar_bytes({f"{key}.jpg": self.image(name, number) for number, key in enumerate(keys)})
        )
        return path

    def write(self, name: str, count: int) -> None:
        samples = []
        total = LatentStatistics.empty(CHANNELS)
        for number in range(count):
            key, bucket, image = self.key(name, number), BUCKETS[number % 2], self.image(name, number)
            tensors = latents(hash_of(key), bucket, self.dtype, self.flip)
            self.tensors[key] = tensors
            total = total.merge(LatentStatistics.of(tensors["mean"], tensors["logvar"]))
            members = {**({"jpg": image} if self.keep else {}), "txt": b"a caption"}
            info = {"source": "jpg", "source_sha256": digest(image), "bucket": list(bucket)}
            samples.append(latent_writer.Made(key, None, bucket, tensors, members, info))
        tar, packed = pack(self.store, name, samples, self.packed)
        self.place(name, tar, count, total, packed)

    def place(
        self, name: str, tar: bytes, count: int, total: LatentStatistics, packed: list[PackedFile]
    ) -> None:
        source, keys = self.sources[name].read_bytes(), self.skipped.get(name, [])
        self.sidecars[name] = place(
            self.store,
            name,
            tar,
            count,
            packed,
            total.to_json(),
            input=ShardFile(samples=count + len(keys), bytes=len(source), sha256=digest(source)),
            flip=self.flip,
            skipped={"unreadable image": keys} if keys else {},
        )

    def finish(self) -> Made:
        parts = [LatentStatistics.from_json(self.sidecars[name].statistics) for name in sorted(self.sidecars)]
        total = merge(parts, CHANNELS)
        record = {
            "format_version": 2,
            "model": "model",
            "fingerprint": "f" * 64,
            "resolution": 32,
            "dtype": self.dtype,
            "skipped": sum(len(keys) for keys in self.skipped.values()),
            **total.summary(),
            "merged": total.to_json(),
        }
        self.store.write_bytes("statistics.json", json.dumps(record).encode())
        self.job.finish(samples=total.samples)
        return self

    def replace(self, name: str, data: bytes) -> None:
        """Change a file behind everyone's back."""
        self.store.write_bytes(name, data)

    def flip_bit(self, name: str, byte: int, bit: int = 0) -> None:
        data = bytearray(self.store.read(name) or b"")
        data[byte % len(data)] ^= 1 << bit
        self.replace(name, bytes(data))


def hash_of(key: str) -> int:
    return int(digest(key.encode())[:8], 16)
