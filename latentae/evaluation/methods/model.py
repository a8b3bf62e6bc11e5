"""Other models as methods: what a model is compared with."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latentae.data.transforms import to_float, to_uint8
from latentae.evaluation.methods.base import Made
from latentae.evaluation.methods.quantised import compress_latent
from latentae.models.base import Autoencoder

__all__ = ["ModelMethod"]


class ModelMethod:
    """A model's reconstruction from its posterior mean; `bytes` are what its latent takes with 8 bits, deflated.

    An image whose latent or reconstruction is not finite counts as missing.

    Args:
        name: in metrics.json.
        label: in tables.
        model: in evaluation mode, on the device of the images.
    """

    def __init__(self, name: str, label: str, model: Autoencoder) -> None:
        self.name, self.label, self.model = name, label, model

    def __call__(self, images: Tensor, budgets: Sequence[int]) -> Made:
        """See `Method`."""
        mode = self.model.encode(to_float(images)).mode()
        decoded = self.model.decode(mode)
        finite = (torch.isfinite(mode).flatten(1).all(1) & torch.isfinite(decoded).flatten(1).all(1)).tolist()
        sizes = [
            float(len(compress_latent(z))) if fine else math.nan for z, fine in zip(mode, finite, strict=True)
        ]
        missing = frozenset(row for row, fine in enumerate(finite) if not fine)
        return Made(to_uint8(decoded.nan_to_num()), {"bytes": sizes}, missing)
