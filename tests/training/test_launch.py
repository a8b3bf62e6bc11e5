from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from latentae.errors import TrainingError
from latentae.training.launch import agree, build_accelerator, close_accelerator, in_contact, on_main

WORKER = Path(__file__).with_name("peer_worker.py")


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(rank: int, port: int, how: str) -> subprocess.Popen[str]:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    environment = {**os.environ, **{name: str(value) for name, value in environment.items()}}
    return subprocess.Popen(
        [sys.executable, str(WORKER), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("how", ["killed", "exits", "silent", "bug"])
def test_a_process_that_is_gone_ends_the_others_with_one_line(how):
    port = free_port()
    first, second = (start(rank, port, how) for rank in range(2))
    try:
        out, error = first.communicate(timeout=60)
        if how == "bug":
            assert "RuntimeError: The size of tensor a (2) must match" in error, "a bug is not hidden behind the other's end"
            return
        assert first.returncode == 1, error
        assert out.startswith("lost contact with another process ("), error
        assert out.endswith("); see its own message; the run goes on from the last checkpoint with the same command\n")
        assert out.count("\n") == 1
    finally:
        second.kill()
        second.communicate()


@pytest.mark.parametrize(("key", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")])
def test_launchers_that_shard_a_model_are_refused_with_a_reason(key, name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "true")
    with pytest.raises(TrainingError, match=f"asks for {name}, which takes one model, but two train side by side") as caught:
        build_accelerator("fp32")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "false")
    close_accelerator(build_accelerator("fp32"))


def test_a_process_alone_agrees_with_itself():
    accelerator = build_accelerator("fp32")
    try:
        assert agree(accelerator, True, False) == (True, False)
        assert on_main(accelerator, lambda: 3) == 3
        with pytest.raises(RuntimeError, match="Connection closed by peer"), in_contact(accelerator):
            raise RuntimeError("[gloo/transport] Connection closed by peer")  # there is none
    finally:
        close_accelerator(accelerator)


def test_processes_that_do_not_find_each_other_are_refused():
    code = "from latentae.training.launch import build_accelerator; build_accelerator('fp32')"
    environment = {**os.environ, "WORLD_SIZE": "2"}  # but neither rank nor address, as a launcher of another kind would leave it
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert "TrainingError: the launcher's environment does not say how 2 processes meet (" in done.stderr
    assert "start with `accelerate launch -m latentae train ...`" in done.stderr
