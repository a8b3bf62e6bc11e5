"""Check of an export in plain diffusers: equal reconstructions, and a decoded latent."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentae.data.loader import image_batches
from latentae.data.shard_files import expand_shards
from latentae.data.transforms import to_float, to_uint8
from latentae.errors import MissingDependencyError, ModelError
from latentae.models.pretrained import load_model

if TYPE_CHECKING:
    from latentae.encoding.latent_dataset import LatentDataset

__all__ = ["DiffusersCheck", "decode_in_diffusers"]

TOLERANCE = 1e-5
IMAGES = 8


@dataclass(frozen=True)
class DiffusersCheck:
    """Result of `decode_in_diffusers`.

    Attributes:
        version: of diffusers.
        key: sample whose stored latent was decoded.
        decoded: image of that latent, uint8 [3, H, W].
        largest_difference: between our and diffusers' reconstructions, range [-1, 1].
        images: number of images compared.
    """

    version: str
    key: str
    decoded: Tensor
    largest_difference: float
    images: int


@torch.inference_mode()
def decode_in_diffusers(
    run: Path, exported: Path, latents: LatentDataset, shards: Path, resolution: int
) -> DiffusersCheck:
    """Load an export with diffusers, compare reconstructions on a CPU, and decode a stored latent.

    Raises:
        MissingDependencyError: diffusers is not installed.
        ModelError: the reconstructions differ by more than rounding.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise MissingDependencyError(
            "checking the export needs diffusers; pip install 'latentae[quickstart]'"
        )
    import diffusers

    ours, _ = load_model(run)
    theirs: Any = getattr(diffusers, ours.config.class_name).from_pretrained(exported).eval()
    largest, count = 0.0, 0
    for batch in image_batches(expand_shards(shards), resolution, 4, limit=IMAGES):
        images = to_float(batch.images)
        expected = ours.decode(ours.encode(images).mode())
        encoded = theirs.encode(images)  # diffusers' AutoencoderDC has no posterior
        latent = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        difference = (theirs.decode(latent).sample - expected).abs().max().item()
        largest, count = max(largest, difference), count + len(images)
    if not largest <= TOLERANCE:
        raise ModelError(
            f"diffusers' reconstructions differ by {largest:.3g} from ours, expected at most {TOLERANCE}; "
            "please report this"
        )
    stored = latents[len(latents) // 3]
    decoded = to_uint8(theirs.decode(stored.mean.float()[None]).sample)[0]
    return DiffusersCheck(diffusers.__version__, stored.key, decoded, largest, count)
