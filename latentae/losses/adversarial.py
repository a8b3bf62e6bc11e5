"""The hinge game between autoencoder and discriminator (Lim & Ye 2017, "Geometric GAN"; Miyato et al. 2018, eq. 17 and 18)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["hinge_discriminator", "hinge_generator"]


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """1/2 (relu(1 - D(x)) + relu(1 + D(x'))) averaged over each image's patches, logits [B, 1, h, w] x 2 -> [B]."""
    return 0.5 * (F.relu(1.0 - real) + F.relu(1.0 + fake)).flatten(1).mean(dim=1)


def hinge_generator(fake: Tensor) -> Tensor:
    """-D(x') averaged over each image's patches, logits [B, 1, h, w] -> [B]."""
    return -fake.flatten(1).mean(dim=1)
