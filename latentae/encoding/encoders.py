"""Images to posteriors: the model on its device, and what to do where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from latentae.data.transforms import to_float
from latentae.device import choose_device
from latentae.errors import ModelError
from latentae.models.base import Autoencoder
from latentae.models.pretrained import load_model
from latentae.progress import say

__all__ = ["Encoder", "ModelEncoder", "PatientEncoder", "build_encoder"]

Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 images [B, C, H, W] -> mean and logvar, fp32 on the CPU, [B, z, h, w]."""


def build_encoder(weights_file: Path, device: str, compute: str) -> Encoder:
    """Load a model for encoding; what it takes can be sent to another process.

    Args:
        weights_file: of a ModelSource: its path may be a run, which moves on.
        device: as `choose_device` takes it.
        compute: see ModelEncoder.
    """
    where = choose_device(device)
    return ModelEncoder(load_model(weights_file, device=where)[0], where, compute)


class ModelEncoder:
    """uint8 images -> mean and logvar, fp32 on the CPU.

    Args:
        model: on `device`.
        device: where to compute.
        compute: "fp32", or "bf16" for autocast; the posterior is fp32 either way.
    """

    def __init__(self, model: Autoencoder, device: torch.device, compute: str = "fp32") -> None:
        self.model, self.device, self.half = model, device, compute == "bf16"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 [B, C, H, W] -> mean, logvar [B, z, h, w]; rows that bf16 can't hold are computed again in fp32."""
        images = images.to(self.device, non_blocking=True)
        pixels = to_float(images).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            mean, logvar = self._moments(pixels)
        bad = ~(mean.isfinite() & logvar.isfinite()).flatten(1).all(1)
        if self.half and bad.any():
            again = self._moments(pixels)
            mean[bad], logvar[bad] = again[0][bad], again[1][bad]
        return mean, logvar

    def _moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.model.encode(pixels)
        return posterior.mean.float().cpu(), posterior.logvar.float().cpu()


class PatientEncoder:
    """An encoder that goes on with smaller batches where memory runs out.

    Args:
        encoder: the model.
        batch_size: of all batches that come, the last ones padded.

    Attributes:
        size: images that the encoder gets at once; halved, for good, each time memory runs out.
        smaller: the sizes below `batch_size` that were used since it was last emptied.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder, self.size, self.batch_size = encoder, batch_size, batch_size
        self.smaller: list[int] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As the encoder.

        Raises:
            ModelError: memory does not suffice for one image.
        """
        while (found := self._try(images)) is None:
            self.size //= 2
            say(
                f"encode: out of memory; going on with batches of {self.size} images of {images.shape[2]}x{images.shape[3]}"
            )
        if self.size < self.batch_size and self.size not in self.smaller:
            self.smaller.append(self.size)
        return found

    def _try(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """None where memory ran out; what was computed until then is let go with this frame."""
        try:
            if self.size >= len(images):
                return self.encoder(images)
            parts = [
                self._part(images[start : start + self.size]) for start in range(0, len(images), self.size)
            ]
            return torch.cat([mean for mean, _ in parts]), torch.cat([logvar for _, logvar in parts])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if self.size == 1:
                raise ModelError(
                    f"out of memory with a single image of {images.shape[2]}x{images.shape[3]} pixels; encode at a lower resolution or "
                    f"on another device ({str(error).splitlines()[0]})"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _part(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """A part of a batch, padded to the size of all parts."""
        padded = images.new_zeros((self.size, *images.shape[1:])) if len(images) < self.size else images
        if padded is not images:
            padded[: len(images)] = images
        mean, logvar = self.encoder(padded)
        return mean[: len(images)], logvar[: len(images)]


def _out_of_memory(error: RuntimeError) -> bool:
    """CUDA has an error class for it, the CPU's allocator a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(
        error
    )
