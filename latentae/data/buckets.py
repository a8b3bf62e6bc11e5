"""Aspect-ratio buckets: a few image sizes of about one area, so that batches need not be square (NovelAI 2022; SDXL, appendix I)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from latentae.errors import DataError

__all__ = ["NO_BUCKET", "Bucket", "assign_buckets", "default_buckets"]

Bucket = tuple[int, int]  # height, width

NO_BUCKET = -1  # of an image whose size is not known


def default_buckets(resolution: int, step: int = 64, max_ratio: float = 2.0) -> tuple[Bucket, ...]:
    """Sizes of at most `resolution` x `resolution` pixels, from the tallest to the widest, the square among them.

    Each side is a multiple of `step`; for each shorter side there is the longest other side that keeps to the area, lying and
    standing.

    Args:
        resolution: side of the square bucket in pixels.
        step: of the sides in pixels; a multiple of the autoencoder's downsampling factor.
        max_ratio: largest ratio of the longer to the shorter side.

    Raises:
        DataError: `resolution` is no multiple of `step`, or `max_ratio` is below 1.
    """
    if step < 1 or resolution < step or resolution % step or max_ratio < 1:
        raise DataError(
            f"no buckets for resolution {resolution}, step {step}, largest ratio {max_ratio}; "
            "expected a multiple of the step and a ratio of 1 or more"
        )
    standing = []
    for short in range(step, resolution + step, step):
        long = resolution * resolution // short // step * step
        if long <= max_ratio * short:
            standing.append((long, short))
    lying = [(short, long) for long, short in reversed(standing) if short != long]
    return (*standing, *lying)


def assign_buckets(height: ArrayLike, width: ArrayLike, buckets: Sequence[Bucket]) -> NDArray[np.int64]:
    """The bucket of each image: the one whose aspect ratio differs from the image's by the smallest factor.

    Between two equally near the earlier bucket wins, so the choice is the same on every machine.

    Args:
        height, width: of the upright images in pixels, [N] each; 0 is unknown.
        buckets: (height, width) in pixels, such as `default_buckets` gives.

    Returns:
        Numbers of buckets [N]; `NO_BUCKET` where the size is unknown.

    Raises:
        DataError: no buckets, or a bucket without area.
    """
    if not buckets or min(min(bucket) for bucket in buckets) < 1:
        raise DataError(f"buckets are {list(buckets)}; expected (height, width) pairs above zero")
    heights, widths = np.asarray(height, np.float64), np.asarray(width, np.float64)
    known = (heights > 0) & (widths > 0)
    # Each bucket's bounds are the geometric means with its neighbours' ratios: one sorted search, however many images there are.
    ratios = np.array([wide / high for high, wide in buckets])
    order = np.argsort(ratios, kind="stable")
    first = order[
        np.concatenate([[True], np.diff(ratios[order]) > 0])
    ]  # of buckets with one ratio, the earliest
    bounds = np.sqrt(ratios[first][1:] * ratios[first][:-1])
    shape = np.divide(widths, heights, out=np.ones_like(heights), where=known)
    low, high = np.searchsorted(bounds, shape, "left"), np.searchsorted(bounds, shape, "right")
    return np.where(known, np.minimum(first[low], first[high]), NO_BUCKET)
