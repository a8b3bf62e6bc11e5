"""`--engine ray`: encode shards on a Ray cluster. Each free worker takes the next shard.

Only paths go through Ray. Each worker loads the model once, reads shards and writes to the output,
so it needs access to both: a folder that all machines share, or URLs. Ray restarts a crashed worker
and its shard. After a crash of the driver, run the command again; finished shards are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from latentae.encoding.plan import Encoder, Shard, ShardSettings, Work
from latentae.encoding.shard_encoder import encode_shards
from latentae.encoding.store import Store
from latentae.errors import LatentAEError, MissingDependencyError, OutputError
from latentae.progress import say

__all__ = ["encode_on_ray"]

TRIES = 10  # crashes of workers on one shard before the run ends


def encode_on_ray(work: Work, advance: Callable[[int], object]) -> None:
    """Encode the pending shards on the Ray cluster at RAY_ADDRESS, or on a local one.

    A worker takes one GPU if the job runs on a GPU, else as many cores as torch has threads here,
    because the number of threads may change the last bits.

    Raises:
        MissingDependencyError: Ray is not installed.
        OutputError: the cluster is too small or its workers keep crashing.
        LatentAEError: the error of a worker. Shards in progress are left to the next run.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError(
            f"engine ray needs Ray Data ({error}); run: pip install 'latentae[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        for row in _results(ray, work):
            if row["error"]:
                raise _rebuilt(row["kind"], row["error"])
            advance(row["samples"])
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise OutputError(
            f"the Ray workers failed ({lines[-1] if lines else type(error).__name__}); see Ray's logs, then "
            "run the same command again, which keeps finished shards"
        ) from error
    finally:
        if started:
            ray.shutdown()


def _results(ray: Any, work: Work) -> Iterator[dict[str, Any]]:
    shards = work.pending
    share, workers = _workers(ray, work.settings.pin, len(shards))
    say(f"encode: {workers} Ray workers, {len(shards)} shards")
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = ray.data.from_items([vars(shard) for shard in shards], override_num_blocks=len(shards))
    return rows.map(  # each block goes to one worker, which may retry it
        _Worker,
        fn_constructor_args=(work.store, work.settings, work.make_encoder, torch.get_num_threads()),
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        max_restarts=-1,
        max_task_retries=TRIES,
        **share,
    ).iter_rows()


def _workers(ray: Any, gpu: bool, most: int) -> tuple[dict[str, Any], int]:
    """The resources of one worker, and the number of workers that fit, at most `most`."""
    there = ray.cluster_resources()
    name, kind, amount = ("num_gpus", "GPU", 1) if gpu else ("num_cpus", "CPU", torch.get_num_threads())
    fit = int(there.get(kind, 0)) // amount
    if fit < 1:
        raise OutputError(
            f"the Ray cluster is too small for a worker, which takes {name}={amount}; it has "
            f"CPU={there.get('CPU', 0):g}, GPU={there.get('GPU', 0):g}: add machines, or set OMP_NUM_THREADS"
        )
    return {name: amount}, min(fit, most)


def _rebuilt(kind: str, message: str) -> LatentAEError:
    """A worker's error, of its original class."""
    classes = [LatentAEError]
    for one in classes:
        classes += one.__subclasses__()
    return next((one for one in classes if one.__name__ == kind), LatentAEError)(message)


class _Worker:
    """Runs in a Ray process: loads the model once and encodes one shard per call."""

    def __init__(
        self, store: Store, settings: ShardSettings, make_encoder: Callable[[], Encoder], threads: int
    ) -> None:
        torch.set_num_threads(threads)
        self.store, self.settings, self.make_encoder = store, settings, make_encoder
        self.encoder: Encoder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encode a shard unless it is finished, for example by a worker that crashed afterwards."""
        shard = Shard(**row)
        result = {"name": shard.name, "samples": shard.samples, "kind": "", "error": ""}
        try:
            if shard.finished(self.store, self.settings.fingerprint) is None:
                self.encoder = self.encoder or self.make_encoder()
                for _ in encode_shards([shard], self.store, self.encoder, self.settings):
                    continue
        except LatentAEError as error:  # sent as text
            result |= {"kind": type(error).__name__, "error": str(error)}
        return result
