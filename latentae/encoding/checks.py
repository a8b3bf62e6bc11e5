"""What `verify` looks at in one shard. Each check returns what it found wrong, as clauses of one line."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentae.data.shard_files import shard_keys
from latentae.data.sources import shown, size_of, stream
from latentae.data.tars import Sample
from latentae.encoding.contents import ShardContents, local_files
from latentae.encoding.places import JSON_MEMBER, LATENT_MEMBER
from latentae.encoding.sidecar import Sidecar, fits, packed_name, parse_sidecar, sidecar_name
from latentae.encoding.store import Store
from latentae.errors import DataError
from latentae.files import sha256
from latentae.models.latent_statistics import LatentStatistics

__all__ = ["deep_problems", "input_problems", "sidecar_problems", "why_not_done"]

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CLOSE = 1e-6  # relative: statistics computed again, maybe added up in another order


def why_not_done(store: Store, shard: str, sizes: Mapping[str, int]) -> str:
    """Why a shard has no sidecar that vouches for it."""
    if sidecar_name(shard) not in sizes:
        return "it is not done" if shard not in sizes else "it has no sidecar, so it is not done"
    sidecar = parse_sidecar(store.read(sidecar_name(shard)), shard)
    if sidecar is None:
        return f"its sidecar {sidecar_name(shard)} is damaged, or of another shard"
    wanted = {shard: sidecar.output.bytes, **{file.name: file.bytes for file in sidecar.packed}}
    name = next((name for name in wanted if sizes.get(name) != wanted[name]), shard)
    if name not in sizes:
        return f"{name} is not there"
    return (
        f"{name} has {sizes[name]} bytes, expected {wanted[name]}"
        if not fits(sidecar, sizes)
        else "it changed meanwhile"
    )


def sidecar_problems(sidecar: Sidecar) -> Iterator[str]:
    """What does not add up in a sidecar."""
    skipped = sum(len(keys) for keys in sidecar.skipped.values())
    if sidecar.input.samples != sidecar.output.samples + skipped:
        found = f"{sidecar.output.samples} latents and {skipped} skipped"
        yield f"its sidecar counts {found} of {sidecar.input.samples} samples"
    seen = LatentStatistics.from_json(sidecar.statistics).samples
    if seen != sidecar.output.samples:
        yield f"its statistics are of {seen} latents, expected {sidecar.output.samples}"
    if sidecar.packed and sum(file.rows for file in sidecar.packed) != sidecar.output.samples:
        yield f"its packed files hold {sum(file.rows for file in sidecar.packed)} latents, expected {sidecar.output.samples}"


def input_problems(sidecar: Sidecar, source: str, deep: bool) -> Iterator[str]:
    """Whether the input of a shard is still the one it was made from.

    Raises:
        ShardError: `source` can't be read.
    """
    size = size_of(source)
    if size != sidecar.input.bytes:
        yield f"its input {shown(source)} has {size} bytes by now, it was made from {sidecar.input.bytes}"
    elif deep:
        digest = hashlib.sha256()
        with stream(source) as file:
            while block := file.read(1 << 22):
                digest.update(block)
        if digest.hexdigest() != sidecar.input.sha256:
            yield f"its input {shown(source)} holds other bytes by now"


def deep_problems(
    store: Store, sidecar: Sidecar, inputs: Mapping[str, Any], source: str | None
) -> Iterator[str]:
    """What is wrong in the files of a shard, read to the last byte.

    Args:
        store: the output.
        sidecar: of the shard.
        inputs: of the job.
        source: the input shard, if its keys are to be compared.

    Raises:
        DataError, OutputError: a remote file can't be read. What can't be read on a disk is a problem of the shard.
    """
    wanted = {sidecar.shard: sidecar.output.sha256, **{file.name: file.sha256 for file in sidecar.packed}}
    with local_files(store, list(wanted)) as files:
        try:
            other = [name for name, path in files.items() if sha256(path) != wanted[name]]
            yield from (f"{name} holds other bytes than were written (SHA-256)" for name in other)
            with ShardContents(store.show(sidecar.shard), sidecar, files) as contents:
                yield from _Contents(contents, inputs).problems(
                    None if source is None else shard_keys(source)
                )
        except (
            DataError,
            OSError,
            ValueError,
            TypeError,
            LookupError,
            ArithmeticError,
        ) as error:  # any bytes may stand there
            yield str(error)


class _Contents:
    """One pass over the samples of a shard."""

    def __init__(self, contents: ShardContents, inputs: Mapping[str, Any]) -> None:
        self.contents, self.sidecar = contents, contents.sidecar
        self.dtype = _TYPES.get(str(inputs.get("dtype")))
        self.keep_images = bool(inputs.get("keep_images"))
        expected = LatentStatistics.from_json(self.sidecar.statistics)
        self.expected, self.found = expected, LatentStatistics.empty(len(expected.mean))
        self.rows: Counter[str] = Counter()
        self.factors: set[float] = set()
        self.keys: list[str] = []

    def problems(self, source_keys: list[str] | None) -> Iterator[str]:
        for sample in self.contents.samples():
            self.keys.append(sample.key)
            try:
                yield from (f"sample {sample.key!r}: {problem}" for problem in self._sample(sample))
            except DataError as error:
                yield str(error)
        if len(self.keys) != self.sidecar.output.samples:
            yield f"it holds {len(self.keys)} samples, expected {self.sidecar.output.samples}"
        skipped = {key for keys in self.sidecar.skipped.values() for key in keys}
        both = skipped.intersection(self.keys)
        if both:
            yield f"sample {min(both)!r} is there, though its sidecar says that it was skipped"
        if source_keys is not None and self.keys != [key for key in source_keys if key not in skipped]:
            yield "its keys are not those of its input, less those skipped, in that order"
        for file in self.sidecar.packed:
            if self.rows[file.name] != file.rows:
                yield f"{file.name} holds {file.rows} latents, {self.rows[file.name]} of them belong to a sample"
        if len(self.factors) > 1:
            yield f"its latents are {sorted(self.factors)} times smaller than their images, expected one factor"
        yield from self._statistics()

    def _sample(self, sample: Sample) -> Iterator[str]:
        members = [extension for extension, _, _ in sample.members]
        info = self.contents.info(sample)
        if self.sidecar.packed and LATENT_MEMBER in members:
            yield f"it has a {LATENT_MEMBER}, though the shard is packed"
        image = info.get("source")
        if image in members:
            if hashlib.sha256(self.contents.read(sample, image)).hexdigest() != info.get("source_sha256"):
                yield f"its {image} is not the image that {JSON_MEMBER} names"
        elif self.keep_images:
            yield f"its image ({image}) is missing"
        bucket = info["bucket"] if "bucket" in info else info.get("crop", [])[2:]
        if len(bucket) != 2:
            yield f"its {JSON_MEMBER} does not say which part of the image it shows"
            return
        tensors = self.contents.tensors(sample, info)
        if self.sidecar.packed:
            name = packed_name(self.sidecar.shard, *bucket)
            if info["row"] != self.rows[name]:
                yield f"its row is {info['row']}, expected {self.rows[name]}"
            self.rows[name] += 1
        yield from self._tensors(tensors, bucket)

    def _tensors(self, tensors: Mapping[str, Tensor], bucket: list[int]) -> Iterator[str]:
        names = {"mean", "logvar", *(("mean_flip", "logvar_flip") if self.sidecar.flip else ())}
        if set(tensors) != names:
            yield f"it has the tensors {sorted(tensors)}, expected {sorted(names)}"
            return
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        shape = shapes.pop()
        if shapes or len(shape) != 3 or shape[0] != len(self.expected.mean) or 0 in shape:
            yield f"its tensors are {[list(tensor.shape) for tensor in tensors.values()]}, expected one [{len(self.expected.mean)}, h, w]"
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
        with np.errstate(all="ignore"):  # damaged values may be as large as they like
            self.found = self.found.merge(LatentStatistics.of(tensors["mean"], tensors["logvar"]))

    def _statistics(self) -> Iterator[str]:
        expected = self.expected
        spread = np.sqrt(
            expected.m2 / max(expected.count, 1)
        )  # a mean near zero is small beside the values it is of
        sizes = {
            "mean": np.abs(expected.mean) + spread,
            "m2": expected.m2,
            "variance_sum": expected.variance_sum,
        }
        for name, size in sizes.items():
            with np.errstate(all="ignore"):
                close = np.abs(getattr(self.found, name) - getattr(expected, name)) <= _CLOSE * size
            if self.found.count != expected.count or not close.all():
                yield f"the statistics in its sidecar are not those of its latents ({name})"
                return
