"""The verb `verify`: check an output of `encode`, and find the shards to encode again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentae.data.shard_files import expand_shards
from latentae.encoding.options import VerifyOptions
from latentae.encoding.plan import output_names
from latentae.encoding.shard_checks import deep_problems, input_problems, sidecar_problems, why_not_done
from latentae.encoding.sidecar import Sidecar, listed_shards, open_output, read_sidecars, sidecar_name
from latentae.encoding.store import Store
from latentae.file_names import STATISTICS
from latentae.models.latent_statistics import LatentStatistics, merge
from latentae.options import verb
from latentae.progress import Progress

__all__ = ["Fault", "VerifyReport", "verify"]

_AGAIN = "run the same encode command again"


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
                problems = [why_not_done(store, name, sizes)]
            else:
                done[name] = sidecar
                problems = _problems(store, record, sidecar, sources.get(name), options.deep)
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


def _problems(
    store: Store, record: Mapping[str, Any], sidecar: Sidecar, source: str | None, deep: bool
) -> list[str]:
    changed = [] if source is None else list(input_problems(sidecar, source, deep))
    problems = [*sidecar_problems(sidecar), *changed]
    if deep:
        problems += deep_problems(store, sidecar, record["inputs"], None if changed else source)
    return problems


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
