"""latentae trains, measures and ships the latent space of a generative model.

Every verb of the command line is a function of this module. Names are resolved on first use, so
that `import latentae` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from latentae.version import __version__

# Title in the help -> package and verbs; a verb is in the file of its name.
VERBS = {
    "Data": ("data", ("shards", "index", "order")),
    "Train": ("training", ("train", "config", "init")),
    "Latents": ("encoding", ("encode", "verify", "stats", "decode")),
    "Measure": ("evaluation", ("evaluate", "compare", "reconstruct")),
    "Ship": ("exporting", ("export",)),
    "Use": ("tasks", ("features", "anomaly", "denoise", "interpolate", "sample")),
    "Try everything": ("examples", ("quickstart",)),
}
_HOME = {
    "Autoencoder": "models.base",
    "AutoencoderDC": "models.dc.autoencoder",
    "AutoencoderDCConfig": "models.config",
    "AutoencoderKL": "models.autoencoder",
    "AutoencoderKLConfig": "models.config",
    "AutoencoderOutput": "models.base",
    "DiagonalGaussian": "models.base",
    "LatentAEError": "errors",
    "LatentDataset": "encoding.latent_dataset",
    "LinearAutoencoder": "models.linear",
    "LinearAutoencoderConfig": "models.config",
    "fuse": "models.fuse",
    "pipeline": "inference.pipeline",
    **{name: f"{package}.{name}" for package, names in VERBS.values() for name in names},
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from latentae.data.index import index
    from latentae.data.order import order
    from latentae.data.shards import shards
    from latentae.encoding.decode import decode
    from latentae.encoding.encode import encode
    from latentae.encoding.latent_dataset import LatentDataset
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
    from latentae.models.base import Autoencoder, AutoencoderOutput, DiagonalGaussian
    from latentae.models.config import AutoencoderDCConfig, AutoencoderKLConfig, LinearAutoencoderConfig
    from latentae.models.dc.autoencoder import AutoencoderDC
    from latentae.models.fuse import fuse
    from latentae.models.linear import LinearAutoencoder
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
    value = getattr(importlib.import_module(f"latentae.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
