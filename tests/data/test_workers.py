"""A scheduler signals every process of a job: workers go on, so that the trainer can finish its step."""

from __future__ import annotations

import signal
import subprocess
import sys

PROGRAM = """
import os, signal, sys, time
from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions

got = []
for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(number))
loader = TrainLoader(DataOptions(shards=sys.argv[1], resolution=8, validation="none", workers=2), 4, 0)
for number in map(int, sys.argv[2:]):
    batches = iter(loader)
    next(batches)
    os.killpg(os.getpgrp(), number)
    time.sleep(0.3)
    for _ in range(20):
        next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 5, "workers that do not end when they are asked are waited for 5 s each"
print(got)
"""


def test_a_signal_to_the_whole_job_is_left_to_the_trainer(tmp_path, make_shards):
    numbers = [int(signal.SIGTERM), int(signal.SIGUSR1), int(signal.SIGINT)]
    command = [sys.executable, "-c", PROGRAM, make_shards(tmp_path, [12, 12]), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, start_new_session=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str(numbers)
    assert "Traceback" not in done.stderr
