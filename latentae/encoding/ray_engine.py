"""`--engine ray`: the pending shards of a job on the workers of a Ray cluster, whichever worker is free takes the next.

Only paths go through Ray. Each worker loads the model once, reads its shards and writes to the output itself, so it must see both: a
folder that all machines share, or URLs. A worker that dies is started again and its shard encoded anew; a driver that dies is started
again by hand, and the sidecars say what is left, as they do for the local engine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from latentae.encoding.encoders import Encoder
from latentae.encoding.plan import remove_leftovers
from latentae.encoding.shard import ShardSettings, encode_shard
from latentae.encoding.sidecar import finished_sidecar
from latentae.encoding.store import Store
from latentae.errors import LatentAEError, MissingDependencyError, OutputError
from latentae.progress import Progress, say

if TYPE_CHECKING:
    from latentae.encoding.encode import Work

__all__ = ["run"]

TRIES = 10  # deaths of workers over one shard: then it is the shard that kills them


def run(work: Work) -> None:
    """Encode the pending shards of `work` on the Ray cluster at RAY_ADDRESS, or on one that is started here and ends with this call.

    A worker takes one GPU where the job computes on one, else as many cores as torch has threads here: the number of threads may
    change last bits.

    Raises:
        MissingDependencyError: Ray is not installed.
        OutputError: the workers can't write, or they die again and again.
        LatentAEError: what a worker met, as from the local engine; shards that others had in hand are left to the next run.
    """
    ray = _import_ray()
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        _run(ray, work)
    finally:
        if started:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"engine ray needs Ray Data ({error}); run: pip install 'latentae[ray]'"
        ) from error
    return ray


def _run(ray: Any, work: Work) -> None:
    total = sum(shard.samples for shard in work.mine)
    done = total - sum(shard.samples for shard in work.pending)
    if done:
        say(f"encode: {done} of {total} samples are already done")
    remove_leftovers(work.store)
    share, workers = _workers(ray, work)
    say(f"encode: {workers} Ray workers, {len(work.pending)} shards")
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [
        {"source": shard.source, "name": shard.name, "samples": shard.samples, "bytes": shard.bytes}
        for shard in work.pending
    ]
    results = ray.data.from_items(
        rows, override_num_blocks=len(rows)
    ).map(  # a block is what a worker takes, and repeats
        _Worker,
        fn_constructor_args=(work.store, work.settings, work.make_encoder, torch.get_num_threads()),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        max_restarts=-1,
        max_task_retries=TRIES,
        **share,
    )
    with Progress("encoding", total=total or None, initial=done) as progress:
        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise _rebuilt(row["kind"], row["error"])
                progress.advance(row["samples"])
        except ray.exceptions.RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise OutputError(
                f"the Ray workers could not go on ({lines[-1] if lines else type(error).__name__}); see Ray's logs, and run the same "
                "command again, which keeps all finished shards"
            ) from error


def _workers(ray: Any, work: Work) -> tuple[dict[str, Any], int]:
    """What a worker takes of the cluster, and how many fit into it and have something to do."""
    there = ray.cluster_resources()
    if work.settings.pin:  # a GPU job
        share, fit = {"num_gpus": 1}, int(there.get("GPU", 0))
    else:
        share = {"num_cpus": torch.get_num_threads()}
        fit = int(there.get("CPU", 0)) // torch.get_num_threads()
    if fit < 1:
        name, amount = next(iter(share.items()))
        raise OutputError(
            f"the Ray cluster has no room for a worker, which takes {name}={amount}; it has CPU={there.get('CPU', 0):g}, "
            f"GPU={there.get('GPU', 0):g}: add machines, or set OMP_NUM_THREADS"
        )
    return share, min(fit, len(work.pending))


def _rebuilt(kind: str, message: str) -> LatentAEError:
    """An error of a worker, of the class it had there."""
    classes = {one.__name__: one for one in _subclasses(LatentAEError)}
    return classes.get(kind, LatentAEError)(message)


def _subclasses(cls: type[LatentAEError]) -> list[type[LatentAEError]]:
    return [cls, *(deeper for one in cls.__subclasses__() for deeper in _subclasses(one))]


class _Worker:
    """Lives in a process of Ray: the model, and one shard after another."""

    def __init__(
        self, store: Store, settings: ShardSettings, make_encoder: Callable[[], Encoder], threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.store, self.settings, self.make_encoder = store, settings, make_encoder
        self.encoder: Encoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode a shard unless it is done, by a worker that died right after it, say. Errors of ours travel as text."""
        result = {"name": row["name"], "samples": row["samples"], "kind": "", "error": ""}
        try:
            if finished_sidecar(self.store, row["name"], self.settings.fingerprint, row["bytes"]) is None:
                self.encoder = self.encoder or self.make_encoder()
                encode_shard(row["source"], self.store, row["name"], self.encoder, self.settings)
        except LatentAEError as error:
            result |= {"kind": type(error).__name__, "error": str(error)}
        return result
