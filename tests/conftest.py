from __future__ import annotations

import os

import pytest

# Two cores: one thread per process is the fastest for models this small, and keeps results the same from machine to machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
