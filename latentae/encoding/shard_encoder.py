"""Encode shards of images to shards of latents; reading, decoding, encoding and writing overlap.

Batches never cross shards and the last ones are padded, so a shard's bytes depend only on its
input, the model and the batch size. latent_shard.py describes the content of a shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from latentae.data.transforms import to_float
from latentae.device import choose_device
from latentae.encoding.image_batches import Batch, Skipped, batches, decode, read_shards
from latentae.encoding.plan import Encoder, Shard, ShardSettings
from latentae.encoding.shard_writer import Encoded, Event, Finished, write_shards
from latentae.encoding.sidecar import ShardFile, Sidecar
from latentae.encoding.store import Store
from latentae.encoding.threads import Crew
from latentae.errors import ModelError, first_line
from latentae.models.base import Autoencoder
from latentae.models.pretrained import load_model
from latentae.progress import say

__all__ = ["DTYPES", "ModelEncoder", "PatientEncoder", "build_encoder", "encode_shards"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
AHEAD = 2  # batches queued for the encoder, and for the writer


def encode_shards(
    shards: Iterable[Shard],
    store: Store,
    encoder: Encoder,
    settings: ShardSettings,
    advance: Callable[[int], object] = lambda count: None,
) -> Iterator[Sidecar]:
    """Encode shards in order. The encoder runs in the caller's thread.

    Args:
        shards: read lazily; the next shard is requested when the one before has been read.
        store: the output.
        encoder: the model.
        settings: of the job.
        advance: called with the number of samples done.

    Yields:
        The sidecar of each finished shard.

    Raises:
        ShardError: a source is damaged, changes or already holds latents. The shards before it are
            finished first.
        ModelError: a single image does not fit in memory.
        OutputError: the output can't be written.
    """
    with Crew(settings.workers) as crew:
        decoded = crew.map(partial(decode, settings=settings), read_shards(shards), 2 * settings.workers)
        ready = crew.ahead(batches(decoded, settings), AHEAD)
        writing = partial(write_shards, store=store, settings=settings)
        yield from crew.behind(writing, _encode(ready, encoder, settings, advance), AHEAD)


def _encode(
    items: Iterator[Shard | Batch | Skipped | ShardFile],
    encoder: Encoder,
    settings: ShardSettings,
    advance: Callable[[int], object],
) -> Iterator[Event]:
    patient = PatientEncoder(encoder, settings.options.batch_size)
    for item in items:
        if isinstance(item, Batch):
            yield Encoded(item.samples, _latents(item, patient, settings))
            advance(len(item.samples))
        elif isinstance(item, ShardFile):
            yield Finished(item, patient.smaller)
            patient.smaller = []
        else:
            yield item
            advance(isinstance(item, Skipped))


def _latents(batch: Batch, encoder: Encoder, settings: ShardSettings) -> dict[str, Tensor]:
    """The latents of a batch in the stored type, without the padding."""
    dtype, count = DTYPES[settings.options.dtype], len(batch.samples)
    mean, logvar = encoder(batch.images)
    latents = {"mean": mean, "logvar": logvar}
    if settings.options.flip:
        latents["mean_flip"], latents["logvar_flip"] = encoder(batch.images.flip(3))
    return {name: values[:count].to(dtype) for name, values in latents.items()}


def build_encoder(weights_file: Path, device: str, compute: str) -> Encoder:
    """Load a model for encoding. The arguments can be sent to another process.

    Args:
        weights_file: of a ModelSource; its path may be a run that is still training.
        device: see `choose_device`.
        compute: see ModelEncoder.
    """
    where = choose_device(device)
    return ModelEncoder(load_model(weights_file, device=where)[0], where, compute)


class ModelEncoder:
    """A model as an Encoder.

    Args:
        model: on `device`.
        device: of the computation.
        compute: "fp32", or "bf16" for autocast. The posterior is fp32.
    """

    def __init__(self, model: Autoencoder, device: torch.device, compute: str = "fp32") -> None:
        self.model, self.device, self.half = model, device, compute == "bf16"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images; rows with non-finite values in bf16 are computed again in fp32."""
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
    """An Encoder that continues with smaller batches after running out of memory.

    Args:
        encoder: the model.
        batch_size: of the incoming batches.

    Attributes:
        size: images encoded at once; halved permanently each time memory runs out.
        smaller: the sizes below `batch_size` used since the caller last emptied this list.
    """

    def __init__(self, encoder: Encoder, batch_size: int) -> None:
        self.encoder, self.size, self.batch_size = encoder, batch_size, batch_size
        self.smaller: list[int] = []

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch.

        Raises:
            ModelError: a single image does not fit in memory.
        """
        while (found := self._try(images)) is None:
            self.size //= 2
            size = f"{images.shape[2]}x{images.shape[3]}"
            say(f"encode: out of memory; batch size reduced to {self.size} images of {size}")
        if self.size < self.batch_size and self.size not in self.smaller:
            self.smaller.append(self.size)
        return found

    def _try(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Encode, or return None if out of memory. Partial results are freed with this frame."""
        try:
            parts = [self._part(part) for part in images.split(self.size)]
            if len(parts) == 1:
                return parts[0]
            means, logvars = zip(*parts, strict=True)
            return torch.cat(means), torch.cat(logvars)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if self.size == 1:
                raise ModelError(
                    f"out of memory with a single image of {images.shape[2]}x{images.shape[3]} pixels; use a "
                    f"lower resolution or another device ({first_line(error)})"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _part(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode part of a batch, padded to the size of the other parts."""
        count = len(images)
        if count < self.size:
            padded = images.new_zeros((self.size, *images.shape[1:]))
            padded[:count] = images
            images = padded
        mean, logvar = self.encoder(images)
        return mean[:count], logvar[:count]


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether CUDA (an error class) or the CPU's allocator (a message) ran out of memory."""
    cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError)
