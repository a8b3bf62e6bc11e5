"""A scheduler signals every process of a job: workers go on, so that the trainer can finish its step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, time
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions

got = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
loader = TrainLoader(DataOptions(shards=sys.argv[1], resolution=8, validation="none", workers=2), 4, 0)
batches = iter(loader)
next(batches)
os.killpg(os.getpgrp(), int(sys.argv[2]))
time.sleep(0.3)
for _ in range(20):
    next(batches)
began = time.monotonic()
batches.close()
assert time.monotonic() - began < 4, "the workers end when they are asked to"
print(got)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_job_is_left_to_the_trainer(number, tmp_path, make_shards):
    shards = make_shards(tmp_path, [12, 12])
    command = [sys.executable, "-c", PROGRAM, shards, str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == f"[{int(number)}]"
    assert "Traceback" not in done.stderr
