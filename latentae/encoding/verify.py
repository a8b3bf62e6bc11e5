"""The verb `verify`: whether an output of `encode` is what its sidecars say, and if not, what to make again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentae.data.shard_files import expand_shards
from latentae.encoding.checks import deep_problems, input_problems, sidecar_problems, why_not_done
from latentae.encoding.options import VerifyOptions
from latentae.encoding.plan import output_names, read_sidecars
from latentae.encoding.sidecar import SUFFIX, Sidecar, sidecar_name
from latentae.encoding.store import Store
from latentae.errors import OutputError
from latentae.file_names import STATISTICS
from latentae.models.latent_statistics import LatentStatistics, merge
from latentae.options import verb
from latentae.progress import Progress

__all__ = ["Fault", "VerifyReport", "open_output", "verify"]


@dataclass(frozen=True)
class Fault:
    """Something that is not as it should be."""

    shard: str
    """Its name inside the output folder; empty where it is no single shard's fault."""
    problem: str

    def __str__(self) -> str:
        return f"{self.shard}: {self.problem}" if self.shard else self.problem


@dataclass
class VerifyReport:
    """What `verify` found."""

    out: str
    deep: bool
    shards: int = 0
    """Shards looked at, whole or not."""
    samples: int = 0
    """Samples in the shards without fault."""
    bytes: int = 0
    """Of these shards and their packed files."""
    faults: list[Fault] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    """Shards whose sidecar was removed, so that the same encode command makes them again."""

    @property
    def ok(self) -> bool:
        """Whether everything is in place and as it should be."""
        return not self.faults


def open_output(out: str | Path) -> tuple[Store, dict[str, Any]]:
    """An output of `encode`, finished or not, and the record of its job.

    Raises:
        OutputError: it is none.
    """
    store = Store.open(out)
    record = store.record()
    if record.get("verb") != "encode" or not isinstance(record.get("inputs"), Mapping):
        raise OutputError(
            f"{store.shown} was made by latentae {record.get('verb')}; give an output folder of latentae encode"
        )
    return store, record


@verb(VerifyOptions)
def verify(options: VerifyOptions) -> VerifyReport:
    """Check an output of `encode`, and let the same encode command repair what is damaged.

    Every shard must have a valid sidecar, all of one job, and the sizes it says; none may be missing; and `statistics.json` must be
    what the sidecars add up to. `deep` reads everything: hashes, tars, the members of each sample, type, shape and values of each
    tensor, and computes the statistics again. Run it while nothing is encoding into `out`.

    Raises:
        OutputError: `out` is no output of encode, or can't be read.
        ShardError: `shards` names none, or they can't be read.
    """
    store, record = open_output(options.out)
    sizes = store.sizes()
    sources = _sources(options.shards)
    names = sorted(
        {name.removesuffix(SUFFIX) for name in sizes if name.endswith((SUFFIX, ".tar"))} | set(sources)
    )
    report = VerifyReport(store.shown, options.deep, shards=len(names))
    good: Counter[str] = (
        Counter()
    )  # samples and bytes are counted by job until it is known which one most shards are of
    held: Counter[str] = Counter()
    jobs: dict[str, list[str]] = {}
    parts: list[LatentStatistics] = []
    skipped = 0
    damaged: list[str] = []
    with Progress("verifying", total=len(names), unit="shards") as progress:
        for name, sidecar in zip(names, read_sidecars(store, names, sizes), strict=True):
            if sidecar is None:
                problems = [why_not_done(store, name, sizes)]
            else:
                problems = list(_problems(store, record, sidecar, sources.get(name), options.deep))
                jobs.setdefault(sidecar.fingerprint, []).append(name)
                parts.append(LatentStatistics.from_json(sidecar.statistics))
                skipped += sum(len(keys) for keys in sidecar.skipped.values())
                if not problems:
                    good[sidecar.fingerprint] += sidecar.output.samples
                    held[sidecar.fingerprint] += sidecar.output.bytes + sum(
                        file.bytes for file in sidecar.packed
                    )
            if problems:
                damaged.append(name)
            report.faults += [Fault(name, problem) for problem in problems]
            progress.advance(1)
    usual = max(jobs, key=lambda fingerprint: len(jobs[fingerprint]), default="")
    for fingerprint in set(jobs) - {usual}:
        damaged += jobs[fingerprint]
        problem = f"it is of another job than most shards here (fingerprint {fingerprint[:12]}..., not {usual[:12]}...)"
        report.faults += [Fault(name, problem) for name in jobs[fingerprint]]
    report.samples, report.bytes = good[usual], held[usual]
    report.faults.sort(key=lambda fault: fault.shard)
    report.faults += [
        Fault("", problem)
        for problem in _whole_problems(store, record, names, sources, parts, skipped, usual)
    ]
    if options.forget and damaged:
        _forget(store, record, [name for name in sorted(set(damaged)) if sidecar_name(name) in sizes], report)
    return report


def _sources(shards: str | Path | Sequence[str | Path] | None) -> dict[str, str]:
    """Name in the output -> input shard."""
    return (
        {}
        if shards is None
        else {name: source for source, name in output_names(expand_shards(shards)).items()}
    )


def _problems(
    store: Store, record: Mapping[str, Any], sidecar: Sidecar, source: str | None, deep: bool
) -> Iterator[str]:
    yield from sidecar_problems(sidecar)
    changed = list(input_problems(sidecar, source, deep)) if source is not None else []
    yield from changed
    if deep:
        yield from deep_problems(store, sidecar, record["inputs"], None if changed else source)


def _whole_problems(
    store: Store,
    record: Mapping[str, Any],
    names: Sequence[str],
    sources: Mapping[str, str],
    parts: Sequence[LatentStatistics],
    skipped: int,
    fingerprint: str,
) -> Iterator[str]:
    """What is wrong with the output as a whole. `parts` are the statistics of all shards with a valid sidecar, in order."""
    shards = record["inputs"].get("shards")
    planned = shards.get("count", len(names)) if isinstance(shards, Mapping) else len(names)
    if len(names) > planned:
        yield f"there are {len(names)} shards, expected {planned}; some are not of this job"
    elif len(parts) < planned:
        yield f"{len(parts)} of {planned} shards are done; run the same encode command again"
    foreign = sorted(set(names) - set(sources)) if sources else []
    if foreign:
        yield f"{len(foreign)} shards here are of none of the input shards given, the first is {foreign[0]}"
    if len(parts) != planned:
        return
    if not record.get("finished"):
        yield "all shards are done, but the job is not closed; run the same encode command again"
    elif not _holds(store.read(STATISTICS), record["inputs"], parts, skipped, fingerprint):
        yield f"{STATISTICS} is missing, damaged or not what the sidecars add up to; run the same encode command again"


def _holds(
    data: bytes | None,
    inputs: Mapping[str, Any],
    parts: Sequence[LatentStatistics],
    skipped: int,
    fingerprint: str,
) -> bool:
    try:
        found = json.loads(data or b"")
        total = merge(parts, len(found["merged"]["mean"]))
        expected = {
            **total.summary(),
            "merged": total.to_json(),
            "skipped": skipped,
            "fingerprint": fingerprint,
        }
        expected |= {name: inputs[name] for name in ("model", "resolution", "dtype") if name in inputs}
        return all(name in found and found[name] == value for name, value in expected.items())
    except (ValueError, KeyError, TypeError):
        return False


def _forget(store: Store, record: Mapping[str, Any], names: Sequence[str], report: VerifyReport) -> None:
    """Let these shards count as not done."""
    if record.get("finished"):  # first, so that no reader takes an output with shards missing for a whole one
        store.claim("encode", record["inputs"]).reopen()
    for name in names:
        store.remove(sidecar_name(name))
        report.forgotten.append(name)
