from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import pytest
import torch
from forked import Processes

from latentae.errors import LatentAEError, TrainingError
from latentae.training import launch
from latentae.training.launch import agree, build_accelerator, close_accelerator, launched, on_main


def refuse() -> None:
    raise TrainingError("refused on the first")


def peer(how: str) -> None:
    """One of two processes, of which the second one fails as `how` says.

    The first prints how it ended.
    """
    if how == "silent":
        launch.TIMEOUT = timedelta(seconds=5)
    try:
        with launched("fp32") as accelerator:
            meet(accelerator, how)
    except LatentAEError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)


def meet(accelerator, how: str) -> None:
    first = accelerator.is_main_process
    flags = agree(accelerator, False, first, not first, True)
    assert flags == (False, True, True, True), flags
    assert on_main(accelerator, lambda: accelerator.process_index) == 0
    with pytest.raises(TrainingError, match="refused on the first"):
        on_main(accelerator, refuse)
    if not first:
        if how == "silent":
            time.sleep(300)
        return
    if how == "bug":
        torch.zeros(2) + torch.zeros(3)
    while True:
        agree(accelerator, False)


@pytest.mark.parametrize("how", ["silent", "bug"])
def test_a_process_that_is_gone_ends_the_others_with_one_line(how, tmp_path):
    processes = Processes(tmp_path, peer, how, count=2)
    first, second = processes.all
    first.join(120)
    second.kill()
    said = processes.output()
    assert processes.wait()[0] == 1, said
    if how == "bug":
        assert "RuntimeError: The size of tensor a (2) must match" in said, (
            "a bug is not hidden behind the other's end"
        )
        return
    assert said.startswith("lost contact with another process ("), said
    assert said.endswith(
        "); see its own message; run the same command again to resume from the last checkpoint\n"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("key", "name"), [("FSDP", "FSDP"), ("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")]
)
def test_launchers_that_shard_a_model_are_refused_with_a_reason(key, name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "true")
    with pytest.raises(
        TrainingError, match=f"requests {name}, which shards one model, but latentae trains two"
    ) as caught:
        build_accelerator("fp32")
    assert "\n" not in str(caught.value)
    monkeypatch.setenv(f"ACCELERATE_USE_{key}", "false")
    close_accelerator(build_accelerator("fp32"))


def test_a_process_alone_agrees_with_itself(accelerator):
    assert agree(accelerator, True, False) == (True, False)
    assert on_main(accelerator, lambda: 3) == 3


def test_a_process_alone_has_no_peer_to_lose():
    with pytest.raises(RuntimeError, match="Connection closed by peer"), launched("fp32"):
        raise RuntimeError("[gloo/transport] Connection closed by peer")


def start_alone() -> None:
    os.environ["WORLD_SIZE"] = "2"  # but neither rank nor address, as another launcher would leave it
    build_accelerator("fp32")


def test_processes_that_do_not_find_each_other_are_refused(tmp_path):
    processes = Processes(tmp_path, start_alone)
    assert processes.wait() == [1]
    assert (
        "TrainingError: the launcher's environment lacks the address for 2 processes (" in processes.output()
    )
    assert "start with `accelerate launch -m latentae train ...`" in processes.output()
