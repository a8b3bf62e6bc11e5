"""Random numbers that are a function of what they are for, so that no generator's state needs saving.

Each sample draws from its own key (purpose, seed, step, position in the global batch), so the numbers depend neither on the number of
processes nor on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.keyed import derive_seed, whole_seed

__all__ = ["Draws", "keyed_normal", "keyed_uniform"]


def keyed_normal(shape: Sequence[int], seed: int, step: int, first: int, purpose: str = "noise") -> Tensor:
    """Standard normal noise [B, ...] on the CPU; `first` is the position of the first sample in the global batch."""
    noise = torch.empty(tuple(shape))
    for sample, generator in zip(noise, _generators(shape[0], seed, step, first, purpose), strict=True):
        sample.normal_(generator=generator)
    return noise


def keyed_uniform(
    count: int, seed: int, step: int, first: int, purpose: str, shape: Sequence[int] = ()
) -> Tensor:
    """Numbers [count, *shape] in [0, 1) on the CPU."""
    return torch.stack(
        [torch.rand(tuple(shape), generator=g) for g in _generators(count, seed, step, first, purpose)]
    )


@dataclass(frozen=True)
class Draws:
    """The random numbers of one part of a step: some for each sample, some for all samples of all processes."""

    seed: int
    step: int
    first: int
    """Position of the part's first sample in the global batch."""
    count: int
    """Samples of the part."""
    device: torch.device

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal [count, *shape]."""
        return keyed_normal((self.count, *shape), self.seed, self.step, self.first, purpose).to(self.device)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), [count, *shape]."""
        return keyed_uniform(self.count, self.seed, self.step, self.first, purpose, shape).to(self.device)

    def shared(self, purpose: str, count: int) -> list[float]:
        """`count` numbers in [0, 1) that are the same for the whole step: sizes must agree between samples, parts and processes."""
        return keyed_uniform(1, self.seed, self.step, 0, f"{purpose} of the step", (count,))[0].tolist()


def _generators(count: int, seed: int, step: int, first: int, purpose: str) -> Iterator[torch.Generator]:
    generator, seed = torch.Generator(), whole_seed(seed)
    for index in range(count):
        yield generator.manual_seed(
            derive_seed(purpose, seed, step, first + index) >> 1
        )  # torch takes 63 bits
