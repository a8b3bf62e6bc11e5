from __future__ import annotations

import os

import pytest

# One thread per process is fastest for small models, and keeps results equal between machines.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if (
    not torch.cuda.is_available()
):  # without a GPU the kernels run in Triton's interpreter, which is chosen when they are defined
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smooth_images():
    import builders

    return builders.smooth_images


@pytest.fixture(scope="session")
def write_images():
    import builders

    return builders.write_images


@pytest.fixture(scope="session")
def tiny_model():
    import builders

    return builders.tiny_model
