"""Metrics of images against others, and the bootstrap interval of their mean.

Conventions: RGB, uint8, one value per image, fp64. SSIM is that of Wang et al. 2004 as scikit-image
computes it with `gaussian_weights=True, use_sample_covariance=False, data_range=255`: only windows
inside the image count. torchmetrics 1.x also counts windows that mirror the edge; on windows inside
the image the two agree. torchmetrics is not used because importing it takes longer than evaluating
a hundred small images.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentae.errors import ImageError, ModelError
from latentae.keyed import whole_seed

__all__ = ["Interval", "bootstrap_mean", "check_finite", "finite_mean", "finite_rows", "psnr", "ssim"]

PEAK = 255.0
TAPS, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise ImageError(
            f"images have shapes {tuple(a.shape)} and {tuple(b.shape)}, expected two equal [B, C, H, W]"
        )
    if a.dtype != torch.uint8 or b.dtype != torch.uint8:
        raise ImageError(f"images are {a.dtype} and {b.dtype}, expected uint8; round with to_uint8 first")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """PSNR of each image in dB, 10 log10(255^2 / MSE); infinite for identical images.

    Args:
        a: uint8 [B, C, H, W].
        b: uint8, the same shape.

    Returns:
        fp64 [B].

    Raises:
        ImageError: shapes differ, or not uint8.
    """
    _check(a, b)
    squared_error = (a.double() - b.double()).square().mean(dim=(1, 2, 3))
    return 10.0 * torch.log10(PEAK**2 / squared_error)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of each image (Wang et al. 2004, eq. 13).

    It is averaged over channels and the windows inside the image.

    Args:
        a: uint8 [B, C, H, W], sides of at least 11.
        b: uint8, the same shape.

    Returns:
        fp64 [B].

    Raises:
        ImageError: shapes differ, not uint8, or smaller than the window.
    """
    _check(a, b)
    if min(a.shape[2:]) < TAPS:
        raise ImageError(
            f"image is {a.shape[2]} x {a.shape[3]}, SSIM needs sides of at least {TAPS}; evaluate at a "
            "larger resolution"
        )
    x, y = a.double(), b.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x = _blur(x * x) - mean_x.square()
    var_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similarity = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2)
    )
    return similarity.mean(dim=(1, 2, 3))


def _blur(x: Tensor) -> Tensor:
    """Gaussian over the windows inside the image: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    weights = [math.exp(-0.5 * ((tap - TAPS // 2) / SIGMA) ** 2) for tap in range(TAPS)]
    total = sum(weights)
    for dim in (2, 3):
        length = x.shape[dim] - TAPS + 1
        blurred = torch.zeros_like(x.narrow(dim, 0, length))
        for tap, weight in enumerate(weights):
            blurred.add_(x.narrow(dim, tap, length), alpha=weight / total)
        x = blurred
    return x


@dataclass(frozen=True)
class Interval:
    """A mean over images and its 95 % bootstrap interval.

    Attributes:
        mean: over the finite values; None if there is none.
        low: 2.5th percentile of the resampled means.
        high: 97.5th percentile.
        n: number of values in the mean.
        infinite: number of infinite values, which are left out (identical images have an infinite
            PSNR).
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    infinite: int = 0


def bootstrap_mean(values: Sequence[float] | np.ndarray, seed: int = 0, resamples: int = 2000) -> Interval:
    """Mean of one value per image and its percentile bootstrap interval.

    Source: Efron & Tibshirani 1993, ch. 13.

    NaN marks an image without a value and is left out. Infinite values are left out and counted.
    """
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    infinite = int(np.isinf(array).sum())
    if not len(finite):
        return Interval(None, None, None, 0, infinite)
    generator = np.random.default_rng(whole_seed(seed))
    rows = max(1_000_000 // len(finite), 1)  # resamples at a time, to bound memory
    means = []
    for start in range(0, resamples, rows):
        shape = min(rows, resamples - start), len(finite)
        means.append(finite[generator.integers(0, len(finite), shape)].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(float(finite.mean()), float(low), float(high), len(finite), infinite)


def finite_rows(*values: Tensor) -> Tensor:
    """Rows of the batch in which all values [B, ...] are finite: bool [B]."""
    return torch.stack([torch.isfinite(value).flatten(1).all(1) for value in values]).all(0)


def check_finite(what: str, keys: Sequence[str], *values: Tensor) -> None:
    """Check that values [B, ...] of the images with these keys are finite.

    Raises:
        ModelError: names `what` ("reconstruction") and the first image.
    """
    bad = (~finite_rows(*values)).nonzero()
    if len(bad):
        key = keys[int(bad[0])].encode("utf-8", "backslashreplace").decode()
        raise ModelError(
            f"the {what} of {key} has NaN or infinite values; the model has diverged, "
            "use an earlier checkpoint"
        )


def finite_mean(values: Iterable[float]) -> float | None:
    """Mean of the finite values; None if there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else None
