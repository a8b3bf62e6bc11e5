"""The verb `verify`: check an output of `encode`, and find the shards to encode again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from latentae.data.shard_files import expand_shards, shard_keys
from latentae.data.sources import shown, size_of, stream
from latentae.data.tars import Sample
from latentae.encoding.latent_shard import JSON_MEMBER, LATENT_MEMBER, LatentShard, bucket_of
from latentae.encoding.options import VerifyOptions
from latentae.encoding.plan import output_names
from latentae.encoding.shard_encoder import DTYPES
from latentae.encoding.sidecar import (
    Sidecar,
    listed_shards,
    open_output,
    packed_name,
    parse_sidecar,
    read_sidecars,
    sidecar_name,
)
from latentae.encoding.store import Store
from latentae.errors import DataError
from latentae.file_names import STATISTICS
from latentae.files import sha256
from latentae.models.latent_statistics import LatentStatistics, merge
from latentae.options import verb
from latentae.progress import Progress

__all__ = ["Fault", "VerifyReport", "verify"]

_AGAIN = "run the same encode command again"
_CLOSE = 1e-6  # relative difference of statistics that were summed in another order


@dataclass(frozen=True)
class Fault:
    """A problem of a shard or of the output."""

    shard: str
    """Name inside the output folder; empty for the output."""
    problem: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.problem}" if self.shard else self.problem


@dataclass
class VerifyReport:
    """Result of `verify`."""

    out: str
    deep: bool
    shards: int = 0
    """Shards checked."""
    samples: int = 0
    """Samples in the shards without faults."""
    bytes: int = 0
    """Size of these shards and their packed files."""
    faults: list[Fault] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    """Shards whose sidecar was removed, so that the same encode command encodes them again."""

    @property
    def ok(self) -> bool:
        """Whether there are no faults."""
        return not self.faults


@verb(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Check an output of `encode`, so that the same encode command can repair damage.

    Every shard must have a valid sidecar of the same job and files of the recorded sizes, no shard
    may be missing, and `statistics.json` must be the sum of the sidecars. `deep` reads everything:
    hashes, tars, members, and type, shape and values of each tensor, and computes the statistics
    again. Do not run it while `out` is being encoded.

    Raises:
        OutputError: `out` is no output of encode, or can't be read.
        ShardError: `shards` matches no shard, or one can't be read.
    """
    store, record = open_output(options.out)
    sizes = store.sizes()
    shards = [] if options.shards is None else expand_shards(options.shards)
    sources = {name: source for source, name in output_names(shards).items()}
    tars = (name for name in sizes if name.endswith(".tar"))
    names = sorted({*listed_shards(sizes), *tars, *sources})
    report = VerifyReport(store.shown, options.deep, shards=len(names))
    done: dict[str, Sidecar] = {}
    with Progress("verifying", total=len(names), unit="shards") as progress:
        for name, sidecar in zip(names, read_sidecars(store, names, sizes), strict=True):
            if sidecar is None:
                problems = [_why_not_done(store, name, sizes)]
            else:
                done[name] = sidecar
                source = sources.get(name)
                changed = [] if source is None else list(_input_problems(sidecar, source, options.deep))
                problems = [*_sidecar_problems(sidecar), *changed]
                if options.deep:
                    problems += _deep_problems(store, sidecar, record["inputs"], None if changed else source)
            report.faults += [Fault(name, problem) for problem in problems]
            progress.advance(1)
    jobs = Counter(sidecar.fingerprint for sidecar in done.values())
    usual = max(jobs, key=lambda fingerprint: jobs[fingerprint], default="")
    report.faults += [
        Fault(
            name,
            f"it is of another job than most shards here (fingerprint {sidecar.fingerprint[:12]}..., not "
            f"{usual[:12]}...)",
        )
        for name, sidecar in done.items()
        if sidecar.fingerprint != usual
    ]
    damaged = {fault.shard for fault in report.faults}
    good = [sidecar for name, sidecar in done.items() if name not in damaged]
    report.samples = sum(sidecar.output.samples for sidecar in good)
    report.bytes = sum(file.bytes for sidecar in good for file in sidecar.files.values())
    report.faults.sort(key=lambda fault: fault.shard)
    problems = _output_problems(store, record, names, sources, list(done.values()), usual)
    report.faults += [Fault("", problem) for problem in problems]
    if options.forget and damaged:
        if record.get("finished"):  # first, so that readers refuse the incomplete output
            store.claim("encode", record["inputs"]).reopen()
        report.forgotten = sorted(name for name in damaged if sidecar_name(name) in sizes)
        for name in report.forgotten:
            store.remove(sidecar_name(name))
    return report


def _output_problems(
    store: Store,
    record: Mapping[str, Any],
    names: Sequence[str],
    sources: Mapping[str, str],
    done: Sequence[Sidecar],
    fingerprint: str,
) -> Iterator[str]:
    """Check the output as a whole. `done` are all valid sidecars, in order."""
    shards = record["inputs"].get("shards")
    planned = shards.get("count", len(names)) if isinstance(shards, Mapping) else len(names)
    if len(names) > planned:
        yield f"there are {len(names)} shards, expected {planned}; some are of another job"
    elif len(done) < planned:
        yield f"{len(done)} of {planned} shards are done; {_AGAIN}"
    foreign = sorted(set(names) - set(sources)) if sources else []
    if foreign:
        yield f"{len(foreign)} shards match no given input shard, the first is {foreign[0]}"
    if len(done) != planned:
        return
    if not record.get("finished"):
        yield f"all shards are done, but the job is not closed; {_AGAIN}"
    elif not _statistics_match(store.read(STATISTICS), record["inputs"], done, fingerprint):
        yield f"{STATISTICS} is missing, damaged or not the sum of the sidecars; {_AGAIN}"


def _statistics_match(
    data: bytes | None, inputs: Mapping[str, Any], done: Sequence[Sidecar], fingerprint: str
) -> bool:
    try:
        found = json.loads(data or b"")
        parts = (LatentStatistics.from_json(sidecar.statistics) for sidecar in done)
        total = merge(parts, len(found["merged"]["mean"]))
        expected = {
            **total.summary(),
            "merged": total.to_json(),
            "skipped": sum(sidecar.skips for sidecar in done),
            "fingerprint": fingerprint,
            **{name: inputs[name] for name in ("model", "resolution", "dtype") if name in inputs},
        }
        return all(name in found and found[name] == value for name, value in expected.items())
    except (ValueError, KeyError, TypeError):
        return False


def _why_not_done(store: Store, shard: str, sizes: Mapping[str, int]) -> str:
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


def _sidecar_problems(sidecar: Sidecar) -> Iterator[str]:
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


def _input_problems(sidecar: Sidecar, source: str, deep: bool) -> Iterator[str]:
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


def _deep_problems(
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
