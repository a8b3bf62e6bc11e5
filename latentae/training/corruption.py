"""What a recipe does to images before the encoder and to latents before the decoder, with the numbers of one step.

All numbers are functions of (seed, step, position in the global batch), or of (seed, step) where samples must agree, so they depend
neither on the number of processes nor on how a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from latentae.losses.equivariance import EQ_SCALES, Transform, downscale, draw_transform
from latentae.models import corruptions
from latentae.models.config import AutoencoderConfig
from latentae.training.draws import Draws
from latentae.training.recipe import Recipe

__all__ = ["Corruption", "Given", "LatentPath"]


@dataclass(frozen=True)
class Given:
    """What the encoder is given."""

    images: Tensor
    """[B, C, H, W]; with a graph to a learned fill."""
    hidden: Tensor | None = None
    """1 where the losses look, 0 elsewhere, [B, 1, H, W]; None is everywhere."""


@dataclass(frozen=True)
class LatentPath:
    """What happens between encoder and decoder, and what the decoder's output is compared with."""

    latent: Callable[[Tensor], Tensor] | None = None
    """[B, z, h, w] -> [B, z, h', w'], before the decoder."""
    target: Callable[[Tensor], Tensor] | None = None
    """Images [B, C, H, W] -> [B, C, H', W']; None where they stay as they are."""
    smaller: Callable[[Tensor], Tensor] | None = None
    """The smaller latent that is decoded, too."""
    smaller_target: Callable[[Tensor], Tensor] | None = None
    """Images -> what it is compared with."""


class Corruption(nn.Module):
    """The corruptions of a recipe; its parameters are the learned fills. They belong to no network, so the training step reduces them.

    Args:
        recipe: of one phase.
        config: of the autoencoder.
    """

    def __init__(self, recipe: Recipe, config: AutoencoderConfig) -> None:
        super().__init__()
        self.options, self.model, self.equivariance = (
            recipe.corruption,
            recipe.model,
            recipe.loss.equivariance,
        )
        self.config = config
        learned = self.options.mask[1] > 0 and self.options.mask_fill == "learned"
        self.fill = nn.Parameter(torch.zeros(config.in_channels)) if learned else None
        self.latent_fill = (
            nn.Parameter(torch.zeros(config.latent_channels)) if self.model.latent_mask else None
        )

    def images(self, images: Tensor, draws: Draws, phase_images: int) -> Given:
        """Noise, blur and mask, in the order blur, noise, mask; nothing where the recipe has none.

        Args:
            images: [B, C, H, W] in [-1, 1].
            draws: numbers of this part.
            phase_images: images of the phase so far, for the ramp.
        """
        o = self.options
        ramp = min(1.0, phase_images / o.ramp_images) if o.ramp_images else 1.0
        if o.blur[1]:
            sigma = ramp * _between(
                o.blur, replace(draws, device=torch.device("cpu")).uniform("blur")
            )  # it sizes the filter
            images = corruptions.blur(images, sigma)
        if o.noise[1]:
            std = ramp * _between(o.noise, draws.uniform("image noise level"))
            images = corruptions.add_noise(images, draws.normal(images.shape[1:], "image noise"), std)
        if not o.mask[1]:
            return Given(images)
        grid = [-(-side // o.mask_patch) for side in images.shape[-2:]]
        ratio = ramp * _between(o.mask, draws.uniform("mask ratio"))
        mask = corruptions.patch_mask(draws.uniform("mask", grid), ratio)
        fill = torch.zeros(images.shape[1], device=images.device) if self.fill is None else self.fill
        whole = [side * o.mask_patch for side in grid]
        # patches at the right and bottom edge may stick out of the image
        padded = nn.functional.pad(images, (0, whole[1] - images.shape[3], 0, whole[0] - images.shape[2]))
        given = corruptions.fill_masked(padded, mask, fill)[..., : images.shape[2], : images.shape[3]]
        if o.mask_loss == "all":
            return Given(given)
        hidden = mask.repeat_interleave(o.mask_patch, 2).repeat_interleave(o.mask_patch, 3)
        return Given(given, hidden[..., : images.shape[2], : images.shape[3]].to(images.dtype))

    def latent_path(self, shape: tuple[int, int, int], draws: Draws) -> LatentPath:
        """Channels, mask and noise of the latent, then the transform that it shares with its image.

        Args:
            shape: of a latent, (z, h, w).
            draws: numbers of this part.
        """
        steps = self._latent_steps(shape, draws)
        transform = self._transform(draws)
        if transform is not None:
            steps.append(transform.latent)
        f, factor = self.config.downsampling, self._factor(draws)
        return LatentPath(
            (lambda latent: _through(steps, latent)) if steps else None,
            None if transform is None else lambda images: transform.image(images, f),
            None if factor is None else lambda latent: downscale(latent, factor),
            None if factor is None else lambda images: downscale(images, factor, f),
        )

    def _latent_steps(self, shape: tuple[int, int, int], draws: Draws) -> list[Callable[[Tensor], Tensor]]:
        o, steps = self.model, []
        if o.nested_channels:
            (uniform,) = draws.shared("nested channels", 1)
            count = corruptions.nested_count(uniform, shape[0], o.nested_channels)
            steps.append(lambda latent: corruptions.keep_channels(latent, count))
        if self.latent_fill is not None:
            fill, ratio = (
                self.latent_fill,
                corruptions.detok_ratio(draws.uniform("latent mask ratio"), o.latent_mask),
            )
            mask = corruptions.patch_mask(draws.uniform("latent mask", shape[1:]), ratio)
            steps.append(lambda latent: corruptions.mask_latent(latent, mask, fill))
        if o.latent_noise:
            noise, share = (
                o.latent_noise * draws.normal(shape, "latent noise"),
                draws.uniform("latent noise share"),
            )
            steps.append(lambda latent: corruptions.mix_noise(latent, noise, share))
        if o.decoder_noise:
            std = (o.decoder_noise * draws.normal((), "decoder noise level")).abs()
            added = draws.normal(shape, "decoder noise")
            steps.append(lambda latent: corruptions.add_latent_noise(latent, added, std))
        return steps

    def _transform(self, draws: Draws) -> Transform | None:
        o = self.equivariance
        if not o.probability:
            return None
        scales = [scale for scale in EQ_SCALES if scale >= o.smallest_scale] or [1.0]
        chance, *uniforms = draws.shared("equivariance", 3)
        if chance >= o.probability:
            return None
        transform = draw_transform(uniforms, scales)
        return transform if o.quarter_turns else Transform(transform.scale, 0)

    def _factor(self, draws: Draws) -> int | None:
        o = self.equivariance
        if not o.downscaled:
            return None
        (uniform,) = draws.shared("downscaled latent", 1)
        return o.factors[int(uniform * len(o.factors))]


def _between(limits: tuple[float, float], uniform: Tensor) -> Tensor:
    low, high = limits
    return low + (high - low) * uniform


def _through(steps: list[Callable[[Tensor], Tensor]], latent: Tensor) -> Tensor:
    for step in steps:
        latent = step(latent)
    return latent
