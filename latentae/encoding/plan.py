"""Who encodes what, and where it goes: planned from names and sizes alone, the same on every machine."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentae.data.index import ShardIndex
from latentae.encoding.sidecar import Sidecar, finished_sidecar
from latentae.errors import RecipeError, ShardError

__all__ = ["Shard", "output_names", "plan_digest", "plan_shards", "remove_leftovers", "resolve_task", "task_from_environment"]


@dataclass(frozen=True)
class Shard:
    """One unit of work: a shard of images and the shard of latents it becomes."""

    source: str
    name: str
    """Path of the output inside the output folder, with forward slashes."""
    output: Path
    samples: int
    bytes: int

    def finished(self, fingerprint: str) -> Sidecar | None:
        """Its sidecar if it is done for the job with this fingerprint and the input has kept its size, else None."""
        return finished_sidecar(self.output, fingerprint, self.bytes)


def plan_shards(index: ShardIndex, out: Path) -> list[Shard]:
    """All the work of a job, sorted by name."""
    names = output_names([entry.path for entry in index.shards])
    shards = [Shard(e.path, names[e.path], out / names[e.path], e.samples, e.bytes) for e in index.shards]
    return sorted(shards, key=lambda shard: shard.name)


def plan_digest(shards: Sequence[Shard]) -> str:
    """Hex digest of names, sizes and sample counts; the same work has the same digest, however its shards were listed."""
    facts = [[shard.name, shard.bytes, shard.samples] for shard in shards]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def output_names(shards: Sequence[str]) -> dict[str, str]:
    """Where each shard goes inside the output folder: its path below the deepest folder that all of them share.

    Shards of one folder keep their bare names; same-named shards of different folders can't meet.

    Raises:
        ShardError: a shard is given twice, or they lie on different drives.
    """
    absolute = {shard: Path(shard).absolute() for shard in shards}
    try:
        root = os.path.commonpath([path.parent for path in absolute.values()])
    except ValueError as error:
        raise ShardError(f"the shards share no folder ({error}); encode each drive into its own output") from error
    names = {shard: path.relative_to(root).as_posix() for shard, path in absolute.items()}
    if len(names) < len(shards) or len(set(names.values())) < len(shards):
        twice = next(shard for shard in shards if list(shards).count(shard) > 1 or list(names.values()).count(names[shard]) > 1)
        raise ShardError(f"shard {twice} is given twice; name each shard once")
    return names


def task_from_environment(environment: Mapping[str, str]) -> tuple[int, int]:
    """(task_id, num_tasks) as a launcher set them: RANK and WORLD_SIZE, else a SLURM array's variables, else (0, 1)."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        return (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step, int(environment["SLURM_ARRAY_TASK_COUNT"])
    return 0, 1


def resolve_task(task_id: int | None, num_tasks: int | None) -> tuple[int, int]:
    """(task_id, num_tasks) as given, else as a launcher set them; RecipeError where they make no sense."""
    if (task_id is None) != (num_tasks is None):
        raise RecipeError(f"task id is {task_id} and num tasks is {num_tasks}; give both or neither")
    task, tasks = task_from_environment(os.environ) if task_id is None or num_tasks is None else (task_id, num_tasks)
    if not 0 <= task < tasks:
        raise RecipeError(f"task id is {task} of {tasks} tasks, expected 0 to {tasks - 1}")
    return task, tasks


def remove_leftovers(output: Path, older_than: float = 0.0) -> None:
    """Remove what killed writers left of a shard, unless they wrote in the last `older_than` seconds (and may be alive)."""
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.*.incomplete"):
        try:
            if time.time() - leftover.stat().st_mtime >= older_than:
                leftover.unlink()
        except FileNotFoundError:  # another task was faster
            continue
