"""Batches of latents of one size each: what a DataLoader needs where images were encoded in aspect-ratio buckets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from latentae import keyed
from latentae.encoding.latents import LatentDataset

__all__ = ["SizeBatches"]


class SizeBatches(Sampler[list[int]]):
    """The `batch_sampler` of a DataLoader: indices of latents of one size, in an order of its own for each epoch of the data set.

    Args:
        dataset: tells sizes, seed and epoch.
        batch_size: latents in a batch.
        shuffle: in random order, a function of (seed, epoch); else in the order of the data set, size by size.
        drop_last: leave out the latents of each size that fill no batch.
    """

    def __init__(
        self, dataset: LatentDataset, batch_size: int, *, shuffle: bool = True, drop_last: bool = True
    ) -> None:
        self._dataset, self._batch_size, self._shuffle, self._drop_last = (
            dataset,
            batch_size,
            shuffle,
            drop_last,
        )
        _, group = np.unique(dataset.sizes, axis=0, return_inverse=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        self._groups = [
            torch.from_numpy(part) for part in np.split(order, np.cumsum(np.bincount(group.reshape(-1)))[:-1])
        ]

    def __len__(self) -> int:
        extra = 0 if self._drop_last else self._batch_size - 1
        return sum((len(group) + extra) // self._batch_size for group in self._groups)

    def __iter__(self) -> Iterator[list[int]]:
        generator = keyed.generator("latent batches", self._dataset.seed, self._dataset.epoch)
        batches = []
        for group in self._groups:
            mixed = group[torch.randperm(len(group), generator=generator)] if self._shuffle else group
            batches += [
                batch
                for batch in mixed.split(self._batch_size)
                if len(batch) == self._batch_size or not self._drop_last
            ]
        order = (
            torch.randperm(len(batches), generator=generator).tolist()
            if self._shuffle
            else range(len(batches))
        )
        return (batches[number].tolist() for number in order if len(batches[number]))
