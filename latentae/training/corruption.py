"""Corruptions of images and latents in training, and their random numbers.

Every number is a function of (purpose, seed, step, position in the global batch), or of (purpose,
seed, step) where samples must agree. So numbers depend neither on the number of processes nor on
gradient accumulation, and no generator's state is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, nn

from latentae.keyed import keyed_normal, keyed_uniform
from latentae.losses.equivariance import EQ_SCALES, Transform, downscale, draw_transform
from latentae.models import corruptions
from latentae.models.config import AutoencoderConfig
from latentae.training.recipe import Recipe

__all__ = ["Corruption", "Draws", "LatentPath"]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one part of a step.

    Attributes:
        seed: of the recipe.
        step: steps of the run so far.
        first: position of the part's first sample in the global batch.
        count: samples of the part.
        device: where numbers are used.
    """

    seed: int
    step: int
    first: int
    count: int
    device: torch.device

    def normal(self, shape: Sequence[int], purpose: str) -> Tensor:
        """Standard normal [count, *shape]."""
        return keyed_normal((self.count, *shape), self.seed, self.step, self.first, purpose).to(self.device)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """Uniform in [0, 1), [count, *shape]."""
        return keyed_uniform(self.count, self.seed, self.step, self.first, purpose, shape).to(self.device)

    def shared(self, purpose: str, count: int) -> list[float]:
        """`count` numbers in [0, 1) that all samples of a step share, on all processes."""
        return keyed_uniform(1, self.seed, self.step, 0, f"{purpose} of the step", (count,))[0].tolist()


def _unchanged(images: Tensor) -> Tensor:
    return images


@dataclass(frozen=True)
class LatentPath:
    """Changes of the latent before the decoder, and of the target images.

    Attributes:
        latent: [B, z, h, w] -> [B, z, h', w'], before the decoder; None changes nothing.
        target: images [B, C, H, W] -> [B, C, H', W'].
        smaller: the smaller latent to decode as well, if any.
        smaller_target: images -> the target of the smaller latent.
    """

    latent: Callable[[Tensor], Tensor] | None = None
    target: Callable[[Tensor], Tensor] = _unchanged
    smaller: Callable[[Tensor], Tensor] | None = None
    smaller_target: Callable[[Tensor], Tensor] = _unchanged


class Corruption(nn.Module):
    """The corruptions of a recipe.

    Its parameters are the learned fills. They belong to no network, so the training step averages
    their gradients over processes.

    Args:
        recipe: of one phase.
        config: of the autoencoder.
    """

    def __init__(self, recipe: Recipe, config: AutoencoderConfig) -> None:
        super().__init__()
        self.options, self.model, self.config = recipe.corruption, recipe.model, config
        self.equivariance = recipe.loss.equivariance
        learned = self.options.mask[1] > 0 and self.options.mask_fill == "learned"
        self.fill = nn.Parameter(torch.zeros(config.in_channels)) if learned else None
        masked = self.model.latent_mask > 0
        self.latent_fill = nn.Parameter(torch.zeros(config.latent_channels)) if masked else None

    def images(self, images: Tensor, draws: Draws, phase_images: int) -> tuple[Tensor, Tensor | None]:
        """Blur, then add noise, then mask, as the recipe says.

        Args:
            images: [B, C, H, W] in [-1, 1].
            draws: numbers of this part.
            phase_images: images of the phase so far, for the ramp.

        Returns:
            The encoder's input, with a graph to a learned fill; and [B, 1, H, W], 1 where image
            losses count (None: everywhere).
        """
        o = self.options
        ramp = min(1.0, phase_images / o.ramp_images) if o.ramp_images else 1.0
        if o.blur[1]:
            on_cpu = replace(draws, device=torch.device("cpu"))  # sigma determines the filter's size
            images = corruptions.blur(images, ramp * _between(o.blur, on_cpu.uniform("blur")))
        if o.noise[1]:
            std = ramp * _between(o.noise, draws.uniform("image noise level"))
            images = corruptions.add_noise(images, draws.normal(images.shape[1:], "image noise"), std)
        return self._mask(images, draws, ramp) if o.mask[1] else (images, None)

    def _mask(self, images: Tensor, draws: Draws, ramp: float) -> tuple[Tensor, Tensor | None]:
        o, (channels, height, width) = self.options, images.shape[1:]
        grid = [-(-side // o.mask_patch) for side in (height, width)]
        ratio = ramp * _between(o.mask, draws.uniform("mask ratio"))
        mask = corruptions.patch_mask(draws.uniform("mask", grid), ratio)
        fill = torch.zeros(channels, device=images.device) if self.fill is None else self.fill
        # patches may exceed the right and bottom edges
        margin = (0, grid[1] * o.mask_patch - width, 0, grid[0] * o.mask_patch - height)
        given = corruptions.fill_masked(nn.functional.pad(images, margin), mask, fill)[..., :height, :width]
        if o.mask_loss == "all":
            return given, None
        hidden = mask.repeat_interleave(o.mask_patch, 2).repeat_interleave(o.mask_patch, 3)
        return given, hidden[..., :height, :width].to(images.dtype)

    def latent_path(self, shape: tuple[int, int, int], draws: Draws) -> LatentPath:
        """Channels, mask and noise of the latent, then the transform that it shares with its image.

        Args:
            shape: of a latent, (z, h, w).
            draws: numbers of this part.
        """
        steps, transform = self._latent_steps(shape, draws), self._transform(draws)
        f, o, path = self.config.downsampling, self.equivariance, {}
        if transform is not None:
            steps.append(transform.latent)
            path["target"] = lambda images: transform.image(images, f)
        if steps:
            path["latent"] = lambda latent: reduce(lambda value, step: step(value), steps, latent)
        if o.downscaled:
            (uniform,) = draws.shared("downscaled latent", 1)
            factor = o.factors[int(uniform * len(o.factors))]
            path["smaller"] = lambda latent: downscale(latent, factor)
            path["smaller_target"] = lambda images: downscale(images, factor, f)
        return LatentPath(**path)

    def _latent_steps(self, shape: tuple[int, int, int], draws: Draws) -> list[Callable[[Tensor], Tensor]]:
        o, steps = self.model, []
        if o.nested_channels:
            (uniform,) = draws.shared("nested channels", 1)
            count = corruptions.nested_count(uniform, shape[0], o.nested_channels)
            steps.append(lambda latent: corruptions.keep_channels(latent, count))
        if self.latent_fill is not None:
            fill = self.latent_fill
            ratio = corruptions.detok_ratio(draws.uniform("latent mask ratio"), o.latent_mask)
            mask = corruptions.patch_mask(draws.uniform("latent mask", shape[1:]), ratio)
            steps.append(lambda latent: corruptions.mask_latent(latent, mask, fill))
        if o.latent_noise:
            noise = o.latent_noise * draws.normal(shape, "latent noise")
            share = draws.uniform("latent noise share")
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
        chance, *uniforms = draws.shared("equivariance", 3)
        if chance >= o.probability:
            return None
        scales = [scale for scale in EQ_SCALES if scale >= o.smallest_scale] or [1.0]
        transform = draw_transform(uniforms, scales)
        return transform if o.quarter_turns else Transform(transform.scale, 0)


def _between(limits: tuple[float, float], uniform: Tensor) -> Tensor:
    low, high = limits
    return low + (high - low) * uniform
