"""All architectures. A new one needs a module with its class, a config and one line here."""

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
    """An autoencoder of this shape with initial weights."""
    network: Any = ARCHITECTURES[type(config)]
    return network(config)
