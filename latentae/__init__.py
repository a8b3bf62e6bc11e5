"""latentae trains, measures and ships the latent space of a generative model.

Every verb of the command line is a function here, and every public class is reachable by name. Names are resolved on first
use, so that `import latentae` loads neither torch nor anything that sits on it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from latentae.version import __version__

_HOME = {
    "Autoencoder": "latentae.models.base",
    "AutoencoderDC": "latentae.models.dc.autoencoder",
    "AutoencoderDCConfig": "latentae.models.config",
    "AutoencoderKL": "latentae.models.autoencoder",
    "AutoencoderKLConfig": "latentae.models.config",
    "AutoencoderOutput": "latentae.models.base",
    "DiagonalGaussian": "latentae.models.posterior",
    "LatentAEError": "latentae.errors",
    "LatentDataset": "latentae.encoding.latents",
    "LinearAutoencoder": "latentae.models.linear",
    "LinearAutoencoderConfig": "latentae.models.config",
    "anomaly": "latentae.tasks.anomaly",
    "compare": "latentae.evaluation.compare",
    "config": "latentae.training.config",
    "decode": "latentae.encoding.decode",
    "denoise": "latentae.tasks.denoise",
    "encode": "latentae.encoding.encode",
    "evaluate": "latentae.evaluation.evaluate",
    "export": "latentae.exporting.export",
    "features": "latentae.tasks.features",
    "fuse": "latentae.models.fuse",
    "index": "latentae.data.index",
    "init": "latentae.training.init",
    "interpolate": "latentae.tasks.interpolate",
    "order": "latentae.data.order",
    "pipeline": "latentae.inference.pipeline",
    "quickstart": "latentae.examples.quickstart",
    "reconstruct": "latentae.evaluation.reconstruct",
    "sample": "latentae.tasks.sample",
    "shards": "latentae.data.shards",
    "stats": "latentae.encoding.stats",
    "train": "latentae.training.train",
    "verify": "latentae.encoding.verify",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from latentae.data.index import index
    from latentae.data.order import order
    from latentae.data.shards import shards
    from latentae.encoding.decode import decode
    from latentae.encoding.encode import encode
    from latentae.encoding.latents import LatentDataset
    from latentae.encoding.stats import stats
    from latentae.encoding.verify import verify
    from latentae.errors import LatentAEError
    from latentae.evaluation.compare import compare
    from latentae.evaluation.evaluate import evaluate
    from latentae.evaluation.reconstruct import reconstruct
    from latentae.examples.quickstart import quickstart
    from latentae.exporting.export import export
    from latentae.inference.pipeline import pipeline
    from latentae.models.autoencoder import AutoencoderKL
    from latentae.models.base import Autoencoder, AutoencoderOutput
    from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig, LinearAutoencoderConfig
    from latentae.models.dc.autoencoder import AutoencoderDC
    from latentae.models.fuse import fuse
    from latentae.models.linear import LinearAutoencoder
    from latentae.models.posterior import DiagonalGaussian
    from latentae.tasks.anomaly import anomaly
    from latentae.tasks.denoise import denoise
    from latentae.tasks.features import features
    from latentae.tasks.interpolate import interpolate
    from latentae.tasks.sample import sample
    from latentae.training.config import config
    from latentae.training.init import init
    from latentae.training.train import train


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'latentae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
