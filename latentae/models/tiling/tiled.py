"""Encode and decode images too large for memory."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from latentae.errors import ModelError, RecipeError
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.base import DiagonalGaussian
from latentae.models.tiling.blended import Source, Tiles, blend, estimate
from latentae.models.tiling.steps import (
    Norms,
    Step,
    change,
    check_layers,
    decoder_steps,
    encoder_steps,
    output_channels,
    split_decoder,
    split_encoder,
)
from latentae.models.tiling.strips import Map, Store, stream

__all__ = ["KEYS", "MODES", "Tiled"]

MODES = ("blended", "exact")
KEYS = 16384
"""Blended attention uses all positions up to this number, and a regular grid beyond."""


class Tiled:
    """An autoencoder in parts, for images too large for memory (docs/tiling.md). Without gradients.

    "exact" runs layer by layer in strips and stores the maps between layers in scratch files. The
    result is the model's own, to rounding.

    "blended" does the same, in memory, only at the latent's resolution and for attention. The
    levels between there and the image run on overlapping tiles with equal normalizations, so that
    no tile is visible. Their statistics are estimated from samples of the image: that is the only
    difference to the model's own result. An image with no more pixels than a tile runs untiled.

    Args:
        model: on any device; maps are stored in main memory.
        mode: "exact" or "blended".
        tile: side of a tile in image pixels, a multiple of f and at least 4 f; strips and samples
            have as many pixels.
        overlap: share of a tile's side that neighbors have in common, below 0.5.
        scratch: folder for scratch files. By default exact uses the system's temporary folder and
            blended memory.

    Raises:
        ModelError: another type of model, or layers that are replaced or hooked.
        RecipeError: an unknown mode, or a tile or overlap out of bounds.
    """

    def __init__(
        self,
        model: AutoencoderKL,
        mode: str = "blended",
        *,
        tile: int = 512,
        overlap: float = 0.125,
        scratch: str | Path | None = None,
    ) -> None:
        if not isinstance(model, AutoencoderKL):
            raise ModelError(
                f"tiling takes an AutoencoderKL, this is a {type(model).__name__}; run it untiled"
            )
        f = model.config.downsampling
        if mode not in MODES:
            raise RecipeError(f"tiling mode is {mode!r}, expected {' or '.join(MODES)}")
        if tile < 4 * f or tile % f:
            raise RecipeError(
                f"tile is {tile} pixels, expected a multiple of {f} and at least {4 * f} for f = {f}"
            )
        if not 0 <= overlap < 0.5:
            raise RecipeError(
                f"overlap is {overlap}, expected a share of the tile's side from 0 to below 0.5"
            )
        check_layers(model)
        self.model, self.mode, self.tile, self.overlap = model, mode, tile, overlap
        default = Path(tempfile.gettempdir()) if mode == "exact" else None
        self._scratch = default if scratch is None else Path(scratch)

    @torch.no_grad()
    def encode(self, x: Tensor) -> DiagonalGaussian:
        """Images [B, C, H, W] in [-1, 1] -> posterior over latents [B, z, H/f, W/f].

        Raises:
            ImageError: wrong number of channels, or a side that f does not divide.
            OutputError: the scratch folder is not writable or has too little space.
        """
        self.model.check_image(x)
        if self._fits(x.shape[2] * x.shape[3]):
            return self.model.encode(x)
        check_layers(self.model)
        return DiagonalGaussian(torch.cat([self._encode(image) for image in x.split(1)]))

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Raw latents [B, z, h, w] -> images [B, C, f*h, f*w], as `AutoencoderKL.decode`.

        Raises:
            ModelError: wrong number of latent channels.
            OutputError: the scratch folder is not writable or has too little space.
        """
        self.model.check_latent(z)
        if self._fits(z.shape[2] * z.shape[3] * self.model.config.downsampling**2):
            return self.model.decode(z)
        check_layers(self.model)
        return torch.cat([self._decode(latent) for latent in z.split(1)])

    def _fits(self, pixels: int) -> bool:
        return self.mode == "blended" and pixels <= self.tile**2

    def _encode(self, image: Tensor) -> Tensor:
        """[1, C, H, W] -> moments [1, 2z, H/f, W/f]."""
        steps, area = encoder_steps(self.model), self.tile**2
        with Store(self._scratch, image.dtype) as maps:
            if self.mode == "exact":
                return stream(steps, _map(image, maps, 1, area), maps, area).whole(image)
            fine, coarse = split_encoder(steps)
            return stream(coarse, self._blend_features(fine, image, maps), maps, area, KEYS).whole(image)

    def _blend_features(self, fine: list[Step], image: Tensor, maps: Store) -> Map:
        """The encoder's fine levels on tiles, blended into a map."""
        height, width = image.shape[2:]
        scale, channels = round(change(fine)), output_channels(fine)
        out = maps.new(height // scale, width // scale, channels, scale).clear(self.tile**2)

        def cut(top: int, left: int, high: int, wide: int) -> Tensor:
            part = image[:, :, top : top + high, left : left + wide]
            return part.contiguous(memory_format=torch.channels_last)

        source = Source(cut, image, height, width, scale)
        blend(fine, source, out.add, self._norms(fine, source), self._tiles(scale), scale)
        return out.measure(self.tile**2)

    def _decode(self, latent: Tensor) -> Tensor:
        """[1, z, h, w] -> [1, C, f*h, f*w]."""
        steps, area = decoder_steps(self.model), self.tile**2
        with Store(self._scratch, latent.dtype) as maps:
            z = _map(latent, maps, self.model.config.downsampling, area)
            if self.mode == "exact":
                return stream(steps, z, maps, area).whole(latent)
            coarse, fine = split_decoder(steps)
            return self._blend_image(fine, stream(coarse, z, maps, area, KEYS), latent)

    def _blend_image(self, fine: list[Step], features: Map, latent: Tensor) -> Tensor:
        """The decoder's fine levels on tiles, blended into an image."""
        scale = features.scale
        height, width = features.height * scale, features.width * scale
        image = latent.new_zeros((1, output_channels(fine), height, width))

        def cut(top: int, left: int, high: int, wide: int) -> Tensor:
            return features.part(top // scale, left // scale, high // scale, wide // scale).to(latent.device)

        def add(top: int, left: int, part: Tensor) -> None:
            image[:, :, top : top + part.shape[2], left : left + part.shape[3]] += part

        source = Source(cut, latent, height, width, scale)
        blend(fine, source, add, self._norms(fine, source), self._tiles(scale), 1)
        return image

    def _norms(self, fine: list[Step], source: Source) -> Norms:
        known = estimate(fine, source, self.tile)
        return lambda norm, _: known[norm]

    def _tiles(self, unit: int) -> Tiles:
        return Tiles(self.tile, int(self.tile * self.overlap) // unit * unit, unit)


def _map(x: Tensor, maps: Store, scale: int, area: int) -> Map:
    """[1, C, H, W] as a map."""
    out = maps.new(x.shape[2], x.shape[3], x.shape[1], scale)
    for start, stop in out.strips(area):
        out.write(start, x[:, :, start:stop])
    return out
