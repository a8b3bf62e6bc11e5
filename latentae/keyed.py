"""Random numbers that depend on a key (seed and purpose), not on a generator's state."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, SupportsIndex

from pydantic import BeforeValidator

from latentae.errors import RecipeError

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_SEED",
    "AnySeed",
    "Seed",
    "derive_seed",
    "digest",
    "generator",
    "keyed_normal",
    "keyed_uniform",
    "plain_word",
    "run_seed",
    "whole_seed",
]

MAX_SEED = 2**63 - 1  # torch takes 64 bits; a training also uses the seed plus one


def whole_seed(seed: SupportsIndex) -> int:
    """A seed as an int: 3 for `3`, `np.int64(3)` and `torch.tensor(3)`.

    Raises:
        RecipeError: not an integer, such as 3.0 or a torch.Generator.
    """
    try:
        return operator.index(seed)
    except (TypeError, ValueError):
        advice = "its initial_seed()" if hasattr(seed, "initial_seed") else "3"
        raise RecipeError(
            f"seed is {seed!r}, expected a whole number; give an int such as {advice}"
        ) from None


def run_seed(seed: SupportsIndex) -> int:
    """A training's seed as an int; generators of torch and NumPy also use it.

    Raises:
        RecipeError: not an integer from 0 to MAX_SEED.
    """
    plain = whole_seed(seed)
    if not 0 <= plain <= MAX_SEED:
        raise RecipeError(f"seed is {plain}, expected a whole number from 0 to {MAX_SEED}; give another one")
    return plain


def plain_word(word: SupportsIndex | str) -> int | str:
    """A word of a key as it is hashed: the same for equal numbers, or equal texts, of any type."""
    return str(word) if isinstance(word, str) else whole_seed(word)


def derive_seed(*words: SupportsIndex | str) -> int:
    """A 64-bit seed of these words, the same on every machine."""
    text = repr(tuple(map(plain_word, words)))
    return int.from_bytes(
        hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big"
    )


def digest(*words: SupportsIndex | str) -> int:
    """Like `derive_seed` with another hash, which results of diffusability depend on."""
    text = "\0".join(str(plain_word(word)) for word in words).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*words: SupportsIndex | str, hashed: Callable[..., int] = derive_seed) -> torch.Generator:
    """A generator on the CPU, seeded by a hash of all words."""
    from torch import Generator  # importing this module must not load torch

    return Generator().manual_seed(hashed(*words) >> 1)  # torch takes 63 bits


def keyed_normal(
    shape: Sequence[int], seed: SupportsIndex, step: int, first: int, purpose: str = "noise"
) -> torch.Tensor:
    """Standard normal noise [B, ...] on the CPU, with a key per sample.

    Args:
        shape: of the noise.
        seed: of the run.
        step: of the run.
        first: position of the first sample in the global batch.
        purpose: part of the key.
    """
    from torch import empty

    noise = empty(tuple(shape))
    for sample, own in zip(noise, _generators(shape[0], seed, step, first, purpose), strict=True):
        sample.normal_(generator=own)
    return noise


def keyed_uniform(
    count: int, seed: SupportsIndex, step: int, first: int, purpose: str, shape: Sequence[int] = ()
) -> torch.Tensor:
    """Numbers [count, *shape] in [0, 1) on the CPU, with the keys of `keyed_normal`."""
    from torch import rand, stack

    return stack(
        [rand(tuple(shape), generator=own) for own in _generators(count, seed, step, first, purpose)]
    )


def _generators(
    count: int, seed: SupportsIndex, step: int, first: int, purpose: str
) -> Iterator[torch.Generator]:
    seed = whole_seed(seed)  # text may be a word of other keys, but not a seed
    for position in range(first, first + count):
        yield generator(purpose, seed, step, position)


def _number(seed: Any) -> Any:
    """A seed on the command line is text."""
    text = seed.strip() if isinstance(seed, str) else ""
    return int(text) if text.lstrip("+-").isdecimal() else seed


AnySeed = Annotated[int, BeforeValidator(lambda seed: whole_seed(_number(seed)))]
"""An integer of any type."""
Seed = Annotated[int, BeforeValidator(lambda seed: run_seed(_number(seed)))]
"""An integer from 0 to MAX_SEED of any type."""
