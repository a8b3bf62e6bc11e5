"""The verb `stats`: per-channel statistics of an output of `encode` and the scaling they suggest."""

from __future__ import annotations

from collections import Counter
from typing import Any

from latentae.encoding.options import StatsOptions
from latentae.encoding.plan import read_sidecars
from latentae.encoding.sidecar import SUFFIX
from latentae.encoding.verify import open_output
from latentae.errors import OutputError
from latentae.models.latent_statistics import LatentStatistics
from latentae.options import verb

__all__ = ["stats", "stats_table"]


@verb(StatsOptions)
def stats(options: StatsOptions) -> dict[str, Any]:
    """The statistics of all latents in an output of `encode`, from the sidecars alone; of those so far if it is not finished.

    Returns:
        `out`, `finished`, `shards` (done), `planned` (shards in all, null where not known), `dtype`, `skipped` (number by reason), and
        what LatentStatistics.summary has: `samples`, `scaling_factor`, `shift_factor`, `latents_mean`, `latents_std`, ...

    Raises:
        OutputError: `out` is no output of encode, can't be read, or its shards are of different models.
    """
    store, record = open_output(options.out)
    sizes = store.sizes()
    names = sorted(name.removesuffix(SUFFIX) for name in sizes if name.endswith(SUFFIX))
    total: LatentStatistics | None = None
    fingerprint, shards = "", 0
    skipped: Counter[str] = Counter()
    for sidecar in read_sidecars(store, names, sizes):
        if sidecar is None:
            continue
        if fingerprint and sidecar.fingerprint != fingerprint:
            raise OutputError(
                f"{store.shown} holds shards of different jobs; find them with `latentae verify`"
            )
        fingerprint, shards = sidecar.fingerprint, shards + 1
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
    """What `stats` returned, as text to print."""
    of = f" of {summary['planned']}" if summary["planned"] is not None else ""
    state = "finished" if summary["finished"] else "not finished: these are the statistics so far"
    lines = [f"{summary['out']}: {summary['samples']} latents in {summary['shards']}{of} shards, {state}"]
    lines += [f"skipped, {reason}: {count}" for reason, count in sorted(summary["skipped"].items())]
    if not summary["samples"]:
        return "\n".join(lines)
    lines.append(f"{'channel':>7}  {'mean':>12}  {'std':>12}  {'std of means':>12}  {'mean sigma':>12}")
    columns = (
        summary[name] for name in ("latents_mean", "latents_std", "posterior_mean_std", "posterior_std")
    )
    for channel, values in enumerate(zip(*columns, strict=True)):
        lines.append(f"{channel:>7}  " + "  ".join(f"{value:>12.6f}" for value in values))
    scaling = summary["scaling_factor"]
    lines.append(
        f"suggested scaling_factor {scaling:.6g}"
        if scaling is not None
        else "the latents do not vary: no scaling_factor"
    )
    lines.append(f"suggested shift_factor   {summary['shift_factor']:.6g}")
    return "\n".join(lines)
