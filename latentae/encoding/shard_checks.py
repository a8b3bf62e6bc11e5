"""Checks of one latent shard for `verify`. Each yields its findings as clauses of one line."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from latentae.data.shard_files import shard_keys
from latentae.data.sources import shown, size_of, stream
from latentae.data.tars import Sample
from latentae.encoding.latent_shard import JSON_MEMBER, LATENT_MEMBER, LatentShard, bucket_of
from latentae.encoding.shard_encoder import DTYPES
from latentae.encoding.sidecar import Sidecar, packed_name, parse_sidecar, sidecar_name
from latentae.encoding.store import Store
from latentae.errors import DataError
from latentae.files import sha256
from latentae.models.latent_statistics import LatentStatistics

__all__ = ["deep_problems", "input_problems", "sidecar_problems", "why_not_done"]

_CLOSE = 1e-6  # relative difference of statistics that were summed in another order


def why_not_done(store: Store, shard: str, sizes: Mapping[str, int]) -> str:
    """Why a shard has no valid sidecar."""
    if sidecar_name(shard) not in sizes:
        return "it is not done" if shard not in sizes else "it has no sidecar, so it is not done"
    sidecar = parse_sidecar(store.read(sidecar_name(shard)), shard)
    if sidecar is None:
        return f"its sidecar {sidecar_name(shard)} is damaged, or of another shard"
    for name, file in sidecar.files.items():
        if name not in sizes:
            return f"{name} is missing"
        if sizes[name] != file.bytes:
            return f"{name} has {sizes[name]} bytes, expected {file.bytes}"
    return "it changed during the check"


def sidecar_problems(sidecar: Sidecar) -> Iterator[str]:
    """Check that the counts in a sidecar agree."""
    samples = sidecar.output.samples
    if sidecar.input.samples != samples + sidecar.skips:
        found = f"{samples} latents and {sidecar.skips} skipped"
        yield f"its sidecar counts {found} of {sidecar.input.samples} samples"
    seen = LatentStatistics.from_json(sidecar.statistics).samples
    if seen != samples:
        yield f"its statistics are of {seen} latents, expected {samples}"
    rows = sum(file.rows for file in sidecar.packed)
    if sidecar.packed and rows != samples:
        yield f"its packed files hold {rows} latents, expected {samples}"


def input_problems(sidecar: Sidecar, source: str, deep: bool) -> Iterator[str]:
    """Check that the input of a shard is unchanged.

    Raises:
        ShardError: `source` can't be read.
    """
    size = size_of(source)
    if size != sidecar.input.bytes:
        yield f"its input {shown(source)} has {size} bytes, but {sidecar.input.bytes} when it was encoded"
    elif deep:
        digest = hashlib.sha256()
        with stream(source) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != sidecar.input.sha256:
            yield f"its input {shown(source)} has other bytes than when it was encoded"


def deep_problems(
    store: Store, sidecar: Sidecar, inputs: Mapping[str, Any], source: str | None
) -> Iterator[str]:
    """Check every byte of a shard.

    Args:
        store: the output.
        sidecar: of the shard.
        inputs: of the job.
        source: input shard to compare the keys with.

    Raises:
        DataError, OutputError: a remote file can't be read. An unreadable local file is a problem.
    """
    with LatentShard(store, sidecar) as shard:
        try:
            for name, file in sidecar.files.items():
                if sha256(shard.files[name]) != file.sha256:
                    yield f"{name} has other bytes than were written (SHA-256)"
            yield from _Samples(shard, inputs).problems(None if source is None else shard_keys(source))
        except (DataError, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            yield str(error)  # damaged bytes can cause any of these


class _Samples:
    """One pass over the samples of a shard."""

    def __init__(self, shard: LatentShard, inputs: Mapping[str, Any]) -> None:
        self.shard, self.sidecar = shard, shard.sidecar
        self.dtype = DTYPES.get(str(inputs.get("dtype")))
        self.keep_images = bool(inputs.get("keep_images"))
        self.expected = LatentStatistics.from_json(self.sidecar.statistics)
        self.found = LatentStatistics.empty(len(self.expected.mean))
        self.rows: Counter[str] = Counter()
        self.factors: set[float] = set()

    def problems(self, source_keys: list[str] | None) -> Iterator[str]:
        keys: list[str] = []
        for sample in self.shard.samples():
            keys.append(sample.key)
            try:
                yield from (f"sample {sample.key!r}: {problem}" for problem in self._sample(sample))
            except DataError as error:
                yield str(error)
        if len(keys) != self.sidecar.output.samples:
            yield f"it holds {len(keys)} samples, expected {self.sidecar.output.samples}"
        skipped = {key for some in self.sidecar.skipped.values() for key in some}
        if both := skipped.intersection(keys):
            yield f"sample {min(both)!r} is present, but its sidecar lists it as skipped"
        if source_keys is not None and keys != [key for key in source_keys if key not in skipped]:
            yield "its keys differ from those of its input without the skipped ones"
        for file in self.sidecar.packed:
            if self.rows[file.name] != file.rows:
                used = self.rows[file.name]
                yield f"{file.name} holds {file.rows} latents, {used} of them belong to a sample"
        if len(self.factors) > 1:
            yield f"its latents are {sorted(self.factors)} times smaller than the images, expected one factor"
        yield from self._statistics()

    def _sample(self, sample: Sample) -> Iterator[str]:
        members = [extension for extension, _, _ in sample.members]
        info = self.shard.info(sample)
        if self.sidecar.packed and LATENT_MEMBER in members:
            yield f"it has a {LATENT_MEMBER}, but the shard is packed"
        image = info.get("source")
        if image in members:
            if hashlib.sha256(self.shard.read(sample, image)).hexdigest() != info.get("source_sha256"):
                yield f"its {image} is not the image that {JSON_MEMBER} names"
        elif self.keep_images:
            yield f"its image ({image}) is missing"
        try:
            bucket = bucket_of(info)
        except (KeyError, ValueError, TypeError):
            yield f"its {JSON_MEMBER} does not have the crop of the image"
            return
        tensors = self.shard.tensors(sample, info)
        if self.sidecar.packed:
            name = packed_name(self.sidecar.shard, *bucket)
            if info["row"] != self.rows[name]:
                yield f"its row is {info['row']}, expected {self.rows[name]}"
            self.rows[name] += 1
        yield from self._tensors(tensors, bucket)

    def _tensors(self, tensors: Mapping[str, Tensor], bucket: tuple[int, int]) -> Iterator[str]:
        names = {"mean", "logvar", *(("mean_flip", "logvar_flip") if self.sidecar.flip else ())}
        if set(tensors) != names:
            yield f"it has the tensors {sorted(tensors)}, expected {sorted(names)}"
            return
        channels, shapes = len(self.expected.mean), [list(tensor.shape) for tensor in tensors.values()]
        shape = shapes[0]
        if any(other != shape for other in shapes) or len(shape) != 3 or shape[0] != channels or 0 in shape:
            yield f"its tensors are {shapes}, expected one [{channels}, h, w]"
            return
        factors = {bucket[0] / shape[1], bucket[1] / shape[2]}
        if len(factors) > 1:
            yield f"its latent is {shape[1]} x {shape[2]} for an image of {bucket[0]} x {bucket[1]}"
        self.factors |= factors
        for name, tensor in tensors.items():
            if self.dtype is not None and tensor.dtype != self.dtype:
                yield f"its {name} is {tensor.dtype}, expected {self.dtype}"
            if not tensor.isfinite().all():
                yield f"its {name} is not finite"
                return
        with np.errstate(all="ignore"):  # damaged values may overflow
            self.found = self.found.merge(LatentStatistics.of(tensors["mean"], tensors["logvar"]))

    def _statistics(self) -> Iterator[str]:
        expected = self.expected
        spread = np.sqrt(expected.m2 / max(expected.count, 1))  # a mean can be small relative to the values
        sizes = {
            "mean": abs(expected.mean) + spread,
            "m2": expected.m2,
            "variance_sum": expected.variance_sum,
        }
        for name, size in sizes.items():
            with np.errstate(all="ignore"):
                close = np.abs(getattr(self.found, name) - getattr(expected, name)) <= _CLOSE * size
            if self.found.count != expected.count or not close.all():
                yield f"the statistics in its sidecar do not match its latents ({name})"
                return
