"""Encode in forked children that are killed at random moments, until a run completes.

    python kill_worker.py MODEL SHARDS FOLDER KILLS        prints one JSON object

If two children race for an output, one or both are killed. Kills fall at any moment of a run, some
while a file is renamed: children mark those moments in shared memory.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy  # noqa: F401
import torch

from latentae import files
from latentae.encoding import encode as module
from latentae.encoding import image_batches, shard_writer

_memory = mmap.mmap(-1, 4096)
# [0]: renames in progress, [1]: begun. Racing children may lose counts, used only to place kills.
marks = memoryview(_memory)[:16].cast("i")


def marked(function: Callable) -> Callable:
    """A write that is marked from when its content is done until it has its name."""

    def write(*arguments):
        marks[0] += 1
        marks[1] += 1
        try:
            return function(*arguments)
        finally:
            marks[0] -= 1

    return write


def spawn(model: Path, shards: Path, out: Path, options: dict) -> int:
    """A child that encodes; its output goes to OUT.log."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        shard_writer.write_sidecar = marked(shard_writer.write_sidecar)
        os.replace = marked(os.replace)
        os.rename = marked(os.rename)
        module.encode(model, shards, out, **options)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_whole(out: Path, whole: dict[str, bytes]) -> int:
    """Compare all named files with the complete run; returns the number of temporary files left."""
    left = 0
    for name, data in snapshot(out).items() if out.exists() else ():
        if name.endswith(".incomplete"):
            left += 1
        elif name != "latentae.json":
            assert whole.get(name) == data, f"{out}/{name} is not that of the uninterrupted run"
    return left


def kill(model: Path, shards: Path, folder: Path, kills: int, options: dict) -> dict:
    rng = random.Random(0)
    marks[:] = memoryview(bytes(16)).cast("i")
    began = time.perf_counter()
    assert finish(spawn(model, shards, folder / "whole", options)) == 0, (folder / "whole.log").read_text()[
        -2000:
    ]
    seconds, commits = time.perf_counter() - began, marks[1]
    whole = snapshot(folder / "whole")
    fell = {"while files got their names": 0, "elsewhere": 0}
    found = {"left_behind": 0, "races": 0, "runs": 0}
    for run in count():
        out = folder / f"out{run}"
        while True:
            marks[:] = memoryview(bytes(16)).cast("i")
            children = [spawn(model, shards, out, options) for _ in range(1 + (sum(fell.values()) % 3 == 1))]
            found["races"] += len(children) > 1
            # a third of the kills wait for a rename, the others for a random moment of the run
            after, until = rng.randrange(1, commits), time.perf_counter() + rng.random() * 0.8 * seconds
            at_commit = rng.random() < 1 / 3
            while not ended(children[0]) and (marks[1] < after if at_commit else time.perf_counter() < until):
                time.sleep(0.0002)
            fell["while files got their names" if marks[0] > 0 else "elsewhere"] += not ended(children[0])
            os.kill(children[0], signal.SIGKILL)
            codes = [finish(child) for child in children]
            found["left_behind"] += check_whole(out, whole)
            assert all(code in (0, -signal.SIGKILL) for code in codes), Path(f"{out}.log").read_text()[-3000:]
            if 0 in codes or sum(fell.values()) >= kills:
                break
        assert finish(spawn(model, shards, out, options)) == 0, Path(f"{out}.log").read_text()[-3000:]
        assert snapshot(out) == whole, f"{out} is not the uninterrupted run"
        found["runs"] += 1
        if sum(fell.values()) >= kills:
            return {"fell": fell, **found, "seconds": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    files.STALE_SECONDS = 1e9  # a racing child is alive, however slow this machine is
    image_batches.SPAN = 2
    options = json.loads(sys.argv[5])
    print(
        json.dumps(kill(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), options))
    )
