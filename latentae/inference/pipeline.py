"""`latentae.pipeline`: images in, latents out, and back.

image            file, Pillow, NumPy or tensor; any size, 1, 3 or 4 channels, 8 or 16 bits
pixels           [C, H, W] float in [-1, 1], reflected at the right and bottom edge to multiples of f
raw latent       the posterior's mean or a sample, [z, H'/f, W'/f]
latent           (z - shift) * scale, what a diffusion model sees
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentae import keyed
from latentae.data.headers import MAX_PIXELS
from latentae.data.transforms import pad_to_multiple, to_float
from latentae.device import choose_device
from latentae.errors import ImageError, ModelError, RecipeError
from latentae.inference.images import ImageLike, check_output, each_image, present, read
from latentae.inference.latents import Latents
from latentae.inference.normalization import Normalization
from latentae.keyed import whole_seed
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.pretrained import load_model

if TYPE_CHECKING:
    from latentae.models.tiling import Tiled

__all__ = ["LARGEST_PASS", "TILING", "LatentPipeline", "pipeline"]

TILING = ("none", "auto", "blended", "exact")
LARGEST_PASS = (
    1536 * 1536
)  # pixels that go through the network at once; on a CPU kl-f8 needs 2.2 GB per million in fp32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pipeline(
    model: str | Path | Autoencoder,
    *,
    weights: str = "ema",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "fp32",
    tiling: str = "auto",
    batch_size: int = 8,
    max_pixels: int = MAX_PIXELS,
) -> LatentPipeline:
    """Load a model that takes images to latents and back.

    Args:
        model: run folder, checkpoint, exported folder, file, or whatever else `AutoencoderKL.from_pretrained` takes; or a model,
            which is moved to `device` and `dtype` itself, not copied.
        weights: "ema" or "raw" weights of a run.
        device: "auto", "cpu", "cuda", "cuda:1".
        dtype: "fp32", "bf16" or "fp16" (or torch's own), what the network computes in. Latents are fp32 in any case.
        tiling: of an AutoencoderKL: "auto" computes images above `LARGEST_PASS` (2.4 million) pixels in blended tiles, "none" none,
            "blended" all, "exact" all in the slower tiles that give the untiled result. See docs/tiling.md.
        batch_size: images of one size computed at once, fewer where they are large: `LARGEST_PASS` pixels at most.
        max_pixels: refuse image files of more pixels by their header; every file is decoded at its full size.

    Raises:
        ModelError: no such model.
        RecipeError: an option that is none of these.
    """
    kind = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if kind not in DTYPES.values():
        raise RecipeError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    where = choose_device(device)
    network = model if isinstance(model, Autoencoder) else load_model(model, weights)[0]
    return LatentPipeline(
        network.to(where, kind).eval(), tiling=tiling, batch_size=batch_size, max_pixels=max_pixels
    )


class LatentPipeline:
    """Images to the latents of a diffusion model, and back. Nothing here is differentiable.

    Args:
        model: where and in what precision it is to compute.
        tiling, batch_size, max_pixels: see `pipeline`.

    Attributes:
        model: the autoencoder.
        normalization: between raw latents and those given and taken here.

    Raises:
        RecipeError: an unknown tiling, or a batch size below 1.
    """

    def __init__(
        self, model: Autoencoder, *, tiling: str = "auto", batch_size: int = 8, max_pixels: int = MAX_PIXELS
    ) -> None:
        if tiling not in TILING:
            raise RecipeError(f"tiling is {tiling!r}, expected one of {', '.join(TILING)}")
        if tiling in ("blended", "exact") and not isinstance(model, AutoencoderKL):
            raise RecipeError(
                f"tiling is {tiling!r}, but a {type(model).__name__} has no tiles; give 'auto' or 'none'"
            )
        if batch_size < 1:
            raise RecipeError(f"batch_size is {batch_size}, expected 1 or more")
        self.model, self.tiling, self.batch_size, self.max_pixels = model, tiling, batch_size, max_pixels
        self.normalization = Normalization.of(model.config)

    @torch.no_grad()
    def encode(
        self, images: ImageLike | Iterable[ImageLike], *, sample: bool = False, seed: int = 0
    ) -> Latents:
        """Images of any sizes -> their latents, as a diffusion model sees them.

        Args:
            images: one image or several: paths, Pillow images, uint8 or uint16 arrays [H, W] or [H, W, C], tensors [C, H, W]
                (uint8, uint16, or float in [-1, 1]), a batch of one more axis, or a list of any of these. Channels are
                converted as in docs/images.md: without alpha in the model, transparent parts are laid over white.
            sample: draw from the posterior instead of taking its mean.
            seed: of that. Image i gets the noise of (seed, i), whatever the batch size and device.

        Raises:
            ImageError: something is no image, or damaged; its number or path is named.
            ModelError: the result is not finite.
        """
        seed = whole_seed(seed)
        sizes: list[tuple[int, int]] = []
        results: dict[int, Tensor] = {}
        for numbers, batch in self._batches(self._read(images, sizes), 1):
            posterior = self._coder(batch).encode(batch)
            noise = (
                torch.stack([_noise(seed, number, posterior.mean.shape[1:]) for number in numbers])
                if sample
                else None
            )
            raw = posterior.mode() if noise is None else posterior.sample(noise=noise.to(posterior.mean))
            latents = self.normalization.apply(raw.to(torch.float32))
            self._check_finite(latents, "latent", numbers)
            results.update(zip(numbers, latents.unbind(), strict=True))
        return Latents(tuple(results[number] for number in range(len(results))), tuple(sizes))

    @torch.no_grad()
    def decode(
        self,
        latents: Latents | Tensor | Sequence[Tensor],
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        output: str = "pil",
    ) -> list[Any]:
        """Latents, as a diffusion model gives them -> a list of images.

        Args:
            latents: what `encode` gave, [B, z, h, w], [z, h, w], or a list of [z, h, w] of any sizes.
            sizes: height and width to crop each image to, where `latents` do not know them: `encode(...).sizes`. Else images have
                f times the latent's sides.
            output: "pil", "numpy" (uint8 [H, W, C]), "numpy16" (uint16) or "tensor" (float [C, H, W] in [-1, 1], on the model's
                device).

        Raises:
            ModelError: latents of another shape, or a result that is not finite.
            ImageError: sizes that are not those of the latents' images.
            RecipeError: an unknown output.
        """
        f = self.model.config.downsampling
        check_output(output, self.model.config.out_channels)
        if isinstance(latents, Latents):
            latents, sizes = latents.tensors, latents.sizes if sizes is None else sizes
        elif isinstance(latents, Tensor):
            latents = latents[None] if latents.ndim == 3 else latents
        tensors = [self._checked(latent) for latent in latents]
        sizes = [(f * z.shape[1], f * z.shape[2]) for z in tensors] if sizes is None else sizes
        _check_sizes(tensors, sizes, f)
        results: dict[int, Any] = {}
        for numbers, batch in self._batches(tensors, f):
            raw = self.normalization.undo(batch.to(torch.float32)).to(self._dtype)
            images = self._coder(raw, f).decode(raw)
            self._check_finite(images, "image", numbers)
            for number, image in zip(numbers, images, strict=True):
                height, width = sizes[number]
                results[number] = present(image[:, :height, :width], output)
        return [results[number] for number in range(len(results))]

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def _tiled(self) -> Tiled | None:
        """What runs the model in tiles; None where it never is."""
        if self.tiling == "none" or not isinstance(self.model, AutoencoderKL):
            return None
        from latentae.models.tiling import Tiled

        return Tiled(self.model, "blended" if self.tiling == "auto" else self.tiling)

    def _coder(self, batch: Tensor, factor: int = 1) -> Autoencoder | Tiled:
        """The model, or what runs it in tiles; the batch's pixels are `factor` times finer than its elements."""
        small = batch.shape[2] * batch.shape[3] * factor**2 <= LARGEST_PASS
        return self.model if self.tiling == "auto" and small else self._tiled or self.model

    def _read(
        self, images: ImageLike | Iterable[ImageLike], sizes: list[tuple[int, int]]
    ) -> Iterator[Tensor]:
        """Images one by one, padded, in [-1, 1]; their own sizes are put into `sizes`."""
        config = self.model.config
        for number, image in enumerate(each_image(images)):
            pixels = read(image, config.in_channels, f"number {number}", self.max_pixels).to(self._device)
            sizes.append((pixels.shape[1], pixels.shape[2]))
            pixels = pixels if pixels.is_floating_point() else to_float(pixels)
            yield pad_to_multiple(pixels, config.downsampling).to(self._dtype)

    def _batches(self, items: Iterable[Tensor], factor: int) -> Iterator[tuple[list[int], Tensor]]:
        """Tensors [C, H, W] of one size together, with their numbers; no more of each size waits than makes a batch."""
        waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for number, item in enumerate(items):
            group = waiting.setdefault(item.shape, [])
            group.append((number, item))
            if len(group) >= min(
                self.batch_size, LARGEST_PASS // (item.shape[1] * item.shape[2] * factor**2)
            ):
                yield _together(waiting.pop(item.shape))
        yield from map(_together, waiting.values())

    def _checked(self, latent: Tensor) -> Tensor:
        channels = self.model.config.latent_channels
        if latent.ndim != 3 or latent.shape[0] != channels or not latent.numel():
            raise ModelError(
                f"found a latent of shape {list(latent.shape)}, expected [{channels}, h, w], or a batch of these"
            )
        return latent.to(self._device)

    def _check_finite(self, results: Tensor, what: str, numbers: list[int]) -> None:
        bad = [
            number
            for number, fine in zip(numbers, results.isfinite().flatten(1).all(1).tolist(), strict=True)
            if not fine
        ]
        if bad:
            half = self._dtype != torch.float32
            advice = (
                "give dtype='fp32'" if half else "its input or the model has such values itself, look at both"
            )
            raise ModelError(
                f"the {what} number {bad[0]} has NaN or infinite values in {self._dtype}; {advice}"
            )


def _together(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    batch = torch.stack([item for _, item in group])
    return [number for number, _ in group], batch.contiguous(memory_format=torch.channels_last)


def _noise(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """Drawn on the CPU, so that a seed means the same everywhere."""
    generator = keyed.generator("pipeline noise", seed, number)
    return torch.randn(tuple(shape), generator=generator)


def _check_sizes(latents: Sequence[Tensor], sizes: Sequence[tuple[int, int]], factor: int) -> None:
    if len(sizes) != len(latents):
        raise ImageError(f"found {len(sizes)} sizes for {len(latents)} latents, expected one for each")
    for latent, size in zip(latents, sizes, strict=True):
        if tuple(-(-side // factor) for side in size) != tuple(latent.shape[1:]):
            raise ImageError(
                f"an image of {size[0]} x {size[1]} pixels has no latent of {latent.shape[1]} x {latent.shape[2]}; give "
                f"(height, width) of the image that was encoded, or no sizes"
            )
