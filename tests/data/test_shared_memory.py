"""Data workers in a container with little shared memory end the run with one line."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from latentae.data.loader import TrainLoader
from latentae.data.options import DataOptions
from latentae.data.shards import write_shards
from latentae.data.shrinking import encode_png
from latentae.data.streaming import StreamLoader
from latentae.errors import DataError


class NoRoom:
    """`Tensor.share_memory_` in a container whose /dev/shm is full."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)\nmore"
        )


@pytest.mark.parametrize("loader", [TrainLoader, StreamLoader])
def test_no_room_for_a_batch_is_said_in_one_line(loader, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    write_shards(
        ({"__key__": str(i), "png": encode_png(image)} for i, image in enumerate(images)), tmp_path / "shards"
    )
    monkeypatch.setattr(
        torch.Tensor, "share_memory_", lambda tensor: NoRoom()(tensor)
    )  # workers are forked, so they see it
    options = DataOptions(shards=str(tmp_path / "shards"), resolution=16, workers=2, validation="none")
    with pytest.raises(
        DataError,
        match=r"could not put a batch of 0\.0\d+ MB into shared memory .*--shm-size=8g.* or set data.workers to 0",
    ):
        next(iter(loader(options, 2, seed=0)))
    assert not multiprocessing.active_children()  # the end of the process would wait for them


def test_without_workers_nothing_is_shared(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    write_shards(
        ({"__key__": str(i), "png": encode_png(image)} for i, image in enumerate(images)), tmp_path / "shards"
    )
    monkeypatch.setattr(torch.Tensor, "share_memory_", lambda tensor: NoRoom()(tensor))
    options = DataOptions(shards=str(tmp_path / "shards"), resolution=16, workers=0, validation="none")
    assert len(next(iter(TrainLoader(options, 2, seed=0))).images) == 2
