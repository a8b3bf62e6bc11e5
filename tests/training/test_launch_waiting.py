"""A process that finds no others says what it waits for, and Ctrl-C ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

CODE = "from latentae.training import launch; launch.PATIENCE = 0.2; launch.build_accelerator('fp32')"


def test_left_over_variables_of_a_launcher_are_named_and_ctrl_c_ends_the_wait():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    left = {
        "WORLD_SIZE": "4",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], env=os.environ | left, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    line = next(line for line in lines if "WORLD_SIZE" in line)
    assert f"process 0 of WORLD_SIZE=4 waits for the other processes at 127.0.0.1:{port}" in line
    assert "unset WORLD_SIZE RANK" in line
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    process.stderr.close()
