"""Linear probe: how well a linear classifier separates classes by their features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentae.data.order import is_held_out

__all__ = ["HELD_OUT", "LinearProbe", "fit_probe", "pooled", "probe_report"]

HELD_OUT = 0.2  # share of the labeled images that the probe is tested on, chosen by key
ROUNDS = 1000


@dataclass(frozen=True)
class LinearProbe:
    """Softmax regression on standardized features.

    Attributes:
        weight: fp64 [classes, d].
        bias: fp64 [classes].
        center, spread: fp64 [d], mean and standard deviation of the training features.
    """

    weight: Tensor
    bias: Tensor
    center: Tensor
    spread: Tensor

    def predict(self, features: Tensor) -> Tensor:
        """[N, d] -> the most likely class of each, int64 [N]."""
        standard = (features.double() - self.center) / self.spread
        return (standard @ self.weight.T + self.bias).argmax(dim=1)


def pooled(latents: Tensor) -> Tensor:
    """Features for the probe: the mean of each latent channel over each quarter of the latent.

    A mean over all positions would keep little but brightness and color. A side of one pixel is not
    divided.

    Args:
        latents: [B, z, h, w], such as posterior means.

    Returns:
        fp32 [B, 4z].
    """
    parts = (min(latents.shape[2], 2), min(latents.shape[3], 2))
    return F.adaptive_avg_pool2d(latents.double(), parts).flatten(1).float()


def fit_probe(features: Tensor, classes: Tensor, count: int, inverse_penalty: float = 1.0) -> LinearProbe:
    """Minimize the sum of cross-entropies + |W|^2 / (2 C) by L-BFGS in fp64.

    This is scikit-learn's LogisticRegression.

    Args:
        features: [N, d].
        classes: int64 [N], from 0.
        count: number of classes.
        inverse_penalty: C.
    """
    features = features.double()
    center, spread = features.mean(dim=0), features.std(dim=0, correction=0)
    spread = torch.where(spread > 0, spread, torch.ones_like(spread))
    standard, n = (features - center) / spread, len(features)
    weight = torch.zeros(count, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    options: dict[str, Any] = {
        "tolerance_grad": 1e-7,
        "tolerance_change": 1e-12,
        "line_search_fn": "strong_wolfe",
    }
    solver = torch.optim.LBFGS([weight, bias], max_iter=ROUNDS, **options)

    def loss() -> Tensor:
        solver.zero_grad()
        penalty = weight.square().sum() / (2 * inverse_penalty * n)
        value = F.cross_entropy(standard @ weight.T + bias, classes) + penalty
        value.backward()
        return value

    solver.step(loss)
    return LinearProbe(weight.detach(), bias.detach(), center, spread)


def probe_report(keys: Sequence[str], labels: Sequence[str], features: Tensor) -> dict[str, Any]:
    """Fit a probe on four fifths of labeled images and test it on the rest, chosen by key.

    Args:
        keys: of N images.
        labels: of the images.
        features: [N, d].

    Returns:
        Plain JSON values; `skipped` is the reason if there is no accuracy.
    """
    names = sorted(set(labels))
    tested = torch.tensor([is_held_out(key, HELD_OUT) for key in keys], dtype=torch.bool)
    classes = torch.tensor([names.index(label) for label in labels])
    report: dict[str, Any] = {
        "method": "softmax regression on standardised features, L2 with C = 1, L-BFGS; "
        "tested on images held out by key",
        "classes": len(names),
        "features": features.shape[1],
        "trained_on": int((~tested).sum()),
        "tested_on": int(tested.sum()),
    }
    if len(names) < 2 or not tested.any() or len(classes[~tested].unique()) < 2:
        reason = "a probe needs two classes to train on and an image to test on; give more labelled images"
        return {**report, "skipped": reason}
    probe = fit_probe(features[~tested], classes[~tested], len(names))
    right = (probe.predict(features) == classes).double()
    most = Counter(classes[~tested].tolist()).most_common(1)[0][0]
    of_class = {name: tested & (classes == number) for number, name in enumerate(names)}
    return {
        **report,
        "accuracy": float(right[tested].mean()),
        "training_accuracy": float(right[~tested].mean()),
        "most_frequent_class": float((classes[tested] == most).double().mean()),
        "by_class": {name: float(right[mask].mean()) for name, mask in of_class.items() if mask.any()},
    }
