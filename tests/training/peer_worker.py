"""One of two processes, of which the second one fails in the way asked for; the first says how it ended and with what exit code."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch

from latentae.errors import LatentAEError, TrainingError
from latentae.training import launch

how = sys.argv[1]
if how == "silent":
    launch.TIMEOUT = timedelta(seconds=3)
accelerator = launch.build_accelerator("fp32")
first = accelerator.is_main_process
flags = launch.agree(accelerator, False, first, not first, True)
assert flags == (False, True, True, True), flags


def refuse() -> None:
    raise TrainingError("refused on the first")


with pytest.raises(TrainingError, match="refused on the first"):
    launch.on_main(accelerator, refuse)

if how == "bug" and not first:
    raise SystemExit(0)
if not first:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "silent":
        time.sleep(60)
    raise SystemExit("an error of its own")
try:
    with launch.in_contact(accelerator):
        if how == "bug":
            torch.zeros(2) + torch.zeros(3)
        while True:
            launch.agree(accelerator, False)
except LatentAEError as error:
    print(error)
    os._exit(error.exit_code)
