"""The exported component in plain diffusers: the same reconstructions, and a stored latent decoded."""

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


@dataclass(frozen=True)
class DiffusersCheck:
    """What plain diffusers made of the export.

    Attributes:
        version: of diffusers.
        key: sample whose stored latent was decoded.
        decoded: that latent's image, uint8 [3, H, W].
        largest_difference: between our reconstructions of held-out images and diffusers', in units of [-1, 1].
        images: how many were compared.
    """

    version: str
    key: str
    decoded: Tensor
    largest_difference: float
    images: int


@torch.inference_mode()
def decode_in_diffusers(
    run: Path, exported: Path, latents: LatentDataset, shards: Path, resolution: int, limit: int = 8
) -> DiffusersCheck:
    """Load an export with diffusers' own class, compare reconstructions on a CPU, and decode a stored latent.

    Raises:
        MissingDependencyError: diffusers is not installed.
        ModelError: the two differ by more than rounding.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise MissingDependencyError(
            "checking the export needs diffusers; pip install 'latentae[quickstart]'"
        )
    import diffusers

    ours, _ = load_model(run)
    theirs: Any = getattr(diffusers, ours.config.class_name).from_pretrained(exported).eval()
    largest, count = 0.0, 0
    for batch in image_batches(expand_shards(shards), resolution, 4, limit=limit):
        images = to_float(batch.images)
        expected = ours.decode(ours.encode(images).mode())
        encoded = theirs.encode(images)  # an AutoencoderDC of diffusers has no posterior
        got = theirs.decode(
            encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
        ).sample
        largest, count = max(largest, (got - expected).abs().max().item()), count + len(images)
    if not largest <= TOLERANCE:
        raise ModelError(
            f"diffusers' reconstructions differ by {largest:.3g} from ours, expected at most {TOLERANCE}; please report this"
        )
    stored = latents[len(latents) // 3]
    decoded = to_uint8(theirs.decode(stored.mean.float()[None]).sample)[0]
    return DiffusersCheck(diffusers.__version__, stored.key, decoded, largest, count)
