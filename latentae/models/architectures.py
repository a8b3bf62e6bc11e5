"""Every architecture. A new one is a module with its class, its config in config.py, and one line here."""

from __future__ import annotations

from typing import Any

from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.config import (
    AutoencoderConfig,
    AutoencoderDCConfig,
    AutoencoderKLConfig,
    LinearAutoencoderConfig,
)
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.linear import LinearAutoencoder

__all__ = ["build"]

ARCHITECTURES: dict[type[AutoencoderConfig], type[Autoencoder]] = {
    AutoencoderKLConfig: AutoencoderKL,
    AutoencoderDCConfig: AutoencoderDC,
    LinearAutoencoderConfig: LinearAutoencoder,
}


def build(config: AutoencoderConfig) -> Autoencoder:
    """The autoencoder of this shape, with the weights its class starts with."""
    network: Any = ARCHITECTURES[type(config)]
    return network(config)
