"""Order values so that ties follow a rule: the last bits of a value depend on the processor, the batch and the number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["SAME", "rank"]

SAME = 1e-4
"""Relative difference up to which two measurements count as equal. One image or model measured twice differs by less in fp32."""


def rank(values: ArrayLike, *, relative: float = SAME, absolute: float = 0.0) -> Iterator[int]:
    """Yield the positions of values from the lowest to the highest; of equal values the earlier position comes first.

    Args:
        values: [N], without NaN.
        relative: largest relative difference between equal values.
        absolute: largest absolute difference between equal values.
    """
    found = np.asarray(values, dtype=np.float64)
    order = np.argsort(found, kind="stable").tolist()
    start = 0
    while start < len(order):
        stop, lowest = start + 1, found[order[start]]
        while stop < len(order) and math.isclose(
            lowest, found[order[stop]], rel_tol=relative, abs_tol=absolute
        ):
            stop += 1
        yield from sorted(order[start:stop])
        start = stop
