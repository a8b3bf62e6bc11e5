"""`latentae.pipeline`: images to latents and back.

image            path, Pillow, NumPy or tensor; any size, 1, 3 or 4 channels, 8 or 16 bits
pixels           [C, H, W] float in [-1, 1], padded by reflection to multiples of f
raw latent       the posterior's mean or a sample, [z, H'/f, W'/f]
latent           (z - shift) * scale, the input of a diffusion model
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentae import keyed
from latentae.data.headers import MAX_PIXELS
from latentae.data.transforms import pad_to_multiple, to_float
from latentae.device import choose_device
from latentae.errors import ImageError, ModelError, RecipeError
from latentae.inference.images import ImageLike, check_output, each_image, present, read
from latentae.models import tiling as tiles
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import Autoencoder
from latentae.models.config import AutoencoderConfig
from latentae.models.pretrained import load_model

__all__ = ["LARGEST_PASS", "TILING", "LatentPipeline", "Latents", "Normalization", "pipeline"]

TILING = ("none", "auto", "blended", "exact")
LARGEST_PASS = 1536 * 1536  # pixels per pass; kl-f8 on a CPU needs 2.2 GB per million in fp32
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
    """Load a model that converts images to latents and back.

    Args:
        model: run, checkpoint, exported folder, file, or anything else that
            `AutoencoderKL.from_pretrained` takes; or a model, which is moved to `device` and
            `dtype` in place.
        weights: "ema" or "raw" weights of a run.
        device: "auto", "cpu", "cuda" or "cuda:1".
        dtype: "fp32", "bf16" or "fp16" (or torch's own) for the network. Latents are always fp32.
        tiling: of an AutoencoderKL. "auto" uses blended tiles for images of more than
            `LARGEST_PASS` (2.4 million) pixels, "none" no tiles, "blended" always tiles, "exact"
            always the slower tiles with the untiled result. See docs/tiling.md.
        batch_size: images of one size per pass, fewer if they exceed `LARGEST_PASS` pixels.
        max_pixels: refuse image files with more pixels in their header.

    Raises:
        ModelError: the model is missing.
        RecipeError: an invalid option.
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise RecipeError(f"dtype is {dtype}, expected one of {', '.join(DTYPES)}")
    where = choose_device(device)
    network = model if isinstance(model, Autoencoder) else load_model(model, weights)[0]
    network = network.to(where, found).eval()
    return LatentPipeline(network, tiling=tiling, batch_size=batch_size, max_pixels=max_pixels)


@dataclass(frozen=True)
class Normalization:
    """The latent of a diffusion model is `(z - shift) * scale` of a raw latent z."""

    shift: Tensor
    """[z or 1, 1, 1] fp32."""
    scale: Tensor
    """[z or 1, 1, 1] fp32."""

    @classmethod
    def of(cls, config: AutoencoderConfig) -> Normalization:
        """The normalization of a config.

        (z - shift_factor) * scaling_factor, as in SD3 and Flux (with shift_factor 0 also SD and
        DiT). With latents_mean and latents_std it is (z - latents_mean) * scaling_factor /
        latents_std, as in SDXL (with scaling_factor 1 also Wan), and shift_factor is ignored.

        Raises:
            ModelError: mean and std are not one number per channel, or a std is not positive.
        """
        mean: tuple[float, ...] | None = getattr(config, "latents_mean", None)
        std: tuple[float, ...] | None = getattr(config, "latents_std", None)
        channels, scaling = config.latent_channels, config.scaling_factor
        if mean is None or std is None:
            return cls(torch.tensor(config.shift_factor).view(1, 1, 1), torch.tensor(scaling).view(1, 1, 1))
        if not len(mean) == len(std) == channels or not all(value > 0 for value in std):
            raise ModelError(
                f"the config has {len(mean)} latents_mean and {len(std)} latents_std (lowest "
                f"{min(std, default=0.0):g}), expected {channels} of each and each std above 0; correct "
                "config.json"
            )
        return cls(torch.tensor(mean).view(-1, 1, 1), scaling / torch.tensor(std).view(-1, 1, 1))

    def apply(self, raw: Tensor) -> Tensor:
        """Raw latents [..., z, h, w] -> latents of a diffusion model."""
        return (raw - self.shift.to(raw.device)) * self.scale.to(raw.device)

    def undo(self, latents: Tensor) -> Tensor:
        """Latents of a diffusion model [..., z, h, w] -> raw latents."""
        return latents / self.scale.to(latents.device) + self.shift.to(latents.device)


@dataclass(frozen=True, repr=False)
class Latents:
    """One latent per image, in order, and the size of each image before padding."""

    tensors: tuple[Tensor, ...]
    """Each [z, h, w] fp32, as a diffusion model takes it."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width in pixels of each image."""

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def batch(self) -> Tensor:
        """All latents as one tensor [B, z, h, w].

        Raises:
            ImageError: the latents differ in size, or there are none.
        """
        shapes = sorted({tuple(latent.shape) for latent in self.tensors})
        if len(shapes) != 1:
            found = " and ".join(" x ".join(map(str, shape)) for shape in shapes) or "no latent"
            raise ImageError(
                f"found {found}, expected latents of one size; resize the images, or use latents one by one"
            )
        return torch.stack(self.tensors)

    def to(self, device: str | torch.device) -> Latents:
        """The same latents on another device."""
        return Latents(tuple(latent.to(device) for latent in self.tensors), self.sizes)

    def __repr__(self) -> str:
        parts = [
            f"{' x '.join(map(str, latent.shape))} of {height} x {width} pixels"
            for latent, (height, width) in zip(self.tensors, self.sizes, strict=True)
        ]
        more = f", and {len(parts) - 4} more" if len(parts) > 4 else ""
        return f"Latents({len(parts)}: {', '.join(parts[:4])}{more})"


class LatentPipeline:
    """Images to the latents of a diffusion model, and back, without gradients.

    Args:
        model: on its device and in its precision.
        tiling, batch_size, max_pixels: see `pipeline`.

    Attributes:
        model: the autoencoder.
        normalization: between raw latents and the latents taken and returned here.

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
                f"tiling is {tiling!r}, but a {type(model).__name__} has no tiles; use 'auto' or 'none'"
            )
        if batch_size < 1:
            raise RecipeError(f"batch_size is {batch_size}, expected 1 or more")
        self.model, self.tiling, self.batch_size, self.max_pixels = model, tiling, batch_size, max_pixels
        self.normalization = Normalization.of(model.config)

    @torch.no_grad()
    def encode(
        self, images: ImageLike | Iterable[ImageLike], *, sample: bool = False, seed: int = 0
    ) -> Latents:
        """Encode images of any sizes to latents of a diffusion model.

        Args:
            images: one or several: paths, Pillow images, uint8 or uint16 arrays [H, W] or [H, W,
                C], tensors [C, H, W] (uint8, uint16, or float in [-1, 1]), a batch with one more
                axis, or a list of these. Channels are converted as in docs/images.md: for a model
                without alpha, transparent parts become white.
            sample: draw from the posterior instead of taking its mean.
            seed: of the draw. Image i gets the noise of (seed, i) for any batch size and device.

        Raises:
            ImageError: an input is no image, or damaged; its number or path is named.
            ModelError: the result is not finite.
        """
        seed = keyed.whole_seed(seed)
        sizes: list[tuple[int, int]] = []
        results: dict[int, Tensor] = {}
        for numbers, batch in self._batches(self._read(images, sizes), 1):
            posterior = self._coder(batch).encode(batch)
            if sample:
                noise = torch.stack([_noise(seed, number, posterior.mean.shape[1:]) for number in numbers])
                raw = posterior.sample(noise=noise.to(posterior.mean))
            else:
                raw = posterior.mode()
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
        """Decode latents of a diffusion model to a list of images.

        Args:
            latents: the result of `encode`, [B, z, h, w], [z, h, w], or a list of [z, h, w] of any
                sizes.
            sizes: height and width to crop each image to, such as `encode(...).sizes`. By default
                those of `latents`, or f times the latent's sides.
            output: "pil", "numpy" (uint8 [H, W, C]), "numpy16" (uint16) or "tensor" (float [C, H,
                W] in [-1, 1], on the model's device).

        Raises:
            ModelError: a latent has another shape, or the result is not finite.
            ImageError: a size does not match its latent.
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
    def _tiled(self) -> tiles.Tiled:
        """The model in tiles."""
        assert isinstance(self.model, AutoencoderKL)
        return tiles.Tiled(self.model, "blended" if self.tiling == "auto" else self.tiling)

    def _coder(self, batch: Tensor, factor: int = 1) -> Autoencoder | tiles.Tiled:
        """The model, in tiles if needed. An element of the batch is `factor` pixels wide."""
        small = batch.shape[2] * batch.shape[3] * factor**2 <= LARGEST_PASS
        whole = self.tiling == "none" or (self.tiling == "auto" and small)
        return self.model if whole or not isinstance(self.model, AutoencoderKL) else self._tiled

    def _read(
        self, images: ImageLike | Iterable[ImageLike], sizes: list[tuple[int, int]]
    ) -> Iterator[Tensor]:
        """Padded images in [-1, 1], one by one. Appends their original sizes to `sizes`."""
        config = self.model.config
        for number, image in enumerate(each_image(images)):
            pixels = read(image, config.in_channels, f"number {number}", self.max_pixels).to(self._device)
            sizes.append((pixels.shape[1], pixels.shape[2]))
            pixels = pixels if pixels.is_floating_point() else to_float(pixels)
            yield pad_to_multiple(pixels, config.downsampling).to(self._dtype)

    def _batches(self, items: Iterable[Tensor], factor: int) -> Iterator[tuple[list[int], Tensor]]:
        """Batches of tensors [C, H, W] of one size, with their numbers. Few wait per size."""
        waiting: dict[torch.Size, list[tuple[int, Tensor]]] = {}
        for number, item in enumerate(items):
            group = waiting.setdefault(item.shape, [])
            group.append((number, item))
            most = min(self.batch_size, LARGEST_PASS // (item.shape[1] * item.shape[2] * factor**2))
            if len(group) >= most:
                yield _together(waiting.pop(item.shape))
        yield from map(_together, waiting.values())

    def _checked(self, latent: Tensor) -> Tensor:
        channels = self.model.config.latent_channels
        if latent.ndim != 3 or latent.shape[0] != channels or not latent.numel():
            raise ModelError(
                f"found a latent of shape {list(latent.shape)}, expected [{channels}, h, w] or a batch"
            )
        return latent.to(self._device)

    def _check_finite(self, results: Tensor, what: str, numbers: list[int]) -> None:
        finite = results.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            half = self._dtype != torch.float32
            advice = "use dtype='fp32'" if half else "check the input and the model for such values"
            raise ModelError(
                f"{what} number {numbers[finite.index(False)]} has NaN or infinite values in {self._dtype}; "
                f"{advice}"
            )


def _together(group: list[tuple[int, Tensor]]) -> tuple[list[int], Tensor]:
    batch = torch.stack([item for _, item in group])
    return [number for number, _ in group], batch.contiguous(memory_format=torch.channels_last)


def _noise(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """Noise drawn on the CPU, so that a seed gives the same noise on any device."""
    return torch.randn(tuple(shape), generator=keyed.generator("pipeline noise", seed, number))


def _check_sizes(latents: Sequence[Tensor], sizes: Sequence[tuple[int, int]], factor: int) -> None:
    if len(sizes) != len(latents):
        raise ImageError(f"found {len(sizes)} sizes for {len(latents)} latents, expected one for each")
    for latent, size in zip(latents, sizes, strict=True):
        if tuple(-(-side // factor) for side in size) != tuple(latent.shape[1:]):
            raise ImageError(
                f"an image of {size[0]} x {size[1]} pixels has no latent of {latent.shape[1]} x "
                f"{latent.shape[2]}; give (height, width) of the encoded image, or no sizes"
            )
