"""The verb `stats`: per-channel statistics of latents and the scaling they suggest."""

from __future__ import annotations

from collections import Counter
from typing import Any

from latentae.encoding.options import StatsOptions
from latentae.encoding.sidecar import listed_shards, open_output, read_sidecars
from latentae.errors import OutputError
from latentae.models.latent_statistics import LatentStatistics
from latentae.options import verb

__all__ = ["stats", "stats_table"]


@verb(StatsOptions)
def stats(options: StatsOptions) -> dict[str, Any]:
    """Sum the statistics of all finished shards, from their sidecars.

    Returns:
        `out`, `finished`, `shards` (done), `planned` (all shards, null if unknown), `dtype`,
        `skipped` (counts by reason), and the fields of LatentStatistics.summary: `samples`,
        `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`, ...

    Raises:
        OutputError: `out` is no output of encode, can't be read, or holds shards of several models.
    """
    store, record = open_output(options.out)
    sizes = store.sizes()
    total: LatentStatistics | None = None
    shards, fingerprints = 0, set[str]()
    skipped: Counter[str] = Counter()
    for sidecar in filter(None, read_sidecars(store, listed_shards(sizes), sizes)):
        shards += 1
        fingerprints.add(sidecar.fingerprint)
        if len(fingerprints) > 1:
            raise OutputError(
                f"{store.shown} holds shards of different jobs; find them with `latentae verify`"
            )
        part = LatentStatistics.from_json(sidecar.statistics)
        total = part if total is None else total.merge(part)
        skipped.update({reason: len(keys) for reason, keys in sidecar.skipped.items()})
    planned = record["inputs"].get("shards")
    return {
        "out": store.shown,
        "finished": bool(record.get("finished")),
        "shards": shards,
        "planned": planned.get("count") if isinstance(planned, dict) else None,
        "dtype": record["inputs"].get("dtype"),
        "skipped": dict(skipped),
        **(total or LatentStatistics.empty(0)).summary(),
    }


def stats_table(summary: dict[str, Any]) -> str:
    """The result of `stats` as text."""
    of = f" of {summary['planned']}" if summary["planned"] is not None else ""
    state = "finished" if summary["finished"] else "not finished, statistics so far"
    lines = [f"{summary['out']}: {summary['samples']} latents in {summary['shards']}{of} shards, {state}"]
    lines += [f"skipped, {reason}: {count}" for reason, count in sorted(summary["skipped"].items())]
    if not summary["samples"]:
        return "\n".join(lines)
    lines.append(f"{'channel':>7}  {'mean':>12}  {'std':>12}  {'std of means':>12}  {'mean sigma':>12}")
    names = ("latents_mean", "latents_std", "posterior_mean_std", "posterior_std")
    for channel, values in enumerate(zip(*(summary[name] for name in names), strict=True)):
        lines.append(f"{channel:>7}  " + "  ".join(f"{value:>12.6f}" for value in values))
    scaling = summary["scaling_factor"]
    none = "the latents are constant: no scaling_factor"
    lines.append(none if scaling is None else f"suggested scaling_factor {scaling:.6g}")
    lines.append(f"suggested shift_factor   {summary['shift_factor']:.6g}")
    return "\n".join(lines)
