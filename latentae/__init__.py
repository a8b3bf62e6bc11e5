"""latentae trains, measures and ships the latent space of a generative model.

Every verb of the command line is a function here, and every public class is reachable by name. Names are resolved on first
use, so that `import latentae` loads neither torch nor anything that sits on it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from latentae.version import __version__

_HOME = {
    "AutoencoderKL": "latentae.models.autoencoder",
    "AutoencoderKLConfig": "latentae.models.config",
    "AutoencoderOutput": "latentae.models.autoencoder",
    "DiagonalGaussian": "latentae.models.posterior",
    "LatentAEError": "latentae.errors",
    "LatentDataset": "latentae.encoding.latents",
    "config": "latentae.training.plan",
    "decode": "latentae.encoding.preview",
    "encode": "latentae.encoding.encode",
    "evaluate": "latentae.evaluation.evaluate",
    "export": "latentae.exporting.export",
    "fuse": "latentae.models.fuse",
    "index": "latentae.data.indexing",
    "order": "latentae.data.listing",
    "quickstart": "latentae.examples.quickstart",
    "reconstruct": "latentae.evaluation.reconstruct",
    "shards": "latentae.data.writing",
    "stats": "latentae.encoding.stats",
    "train": "latentae.training.train",
    "verify": "latentae.encoding.verify",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from latentae.data.indexing import index
    from latentae.data.listing import order
    from latentae.data.writing import shards
    from latentae.encoding.encode import encode
    from latentae.encoding.latents import LatentDataset
    from latentae.encoding.preview import decode
    from latentae.encoding.stats import stats
    from latentae.encoding.verify import verify
    from latentae.errors import LatentAEError
    from latentae.evaluation.evaluate import evaluate
    from latentae.evaluation.reconstruct import reconstruct
    from latentae.examples.quickstart import quickstart
    from latentae.exporting.export import export
    from latentae.models.autoencoder import AutoencoderKL, AutoencoderOutput
    from latentae.models.config import AutoencoderKLConfig
    from latentae.models.fuse import fuse
    from latentae.models.posterior import DiagonalGaussian
    from latentae.training.plan import config
    from latentae.training.train import train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
