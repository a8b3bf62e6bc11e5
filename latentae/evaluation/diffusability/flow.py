"""A small rectified flow on whitened latents, trained for a fixed number of steps and sampled.

Liu et al. 2022; Lipman et al. 2022. With z_0 ~ N(0, I), a latent z_1 and t in [0, 1]: z_t = (1 - t)
z_0 + t z_1, and the loss is E |v(z_t, t) - (z_1 - z_0)|^2. A sample is the solution of dz/dt = v at
t = 1 that starts at z_0. Every random number is keyed by the seed and the step or sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentae.evaluation.diffusability.latents import Latents, Whitening
from latentae.evaluation.diffusability.network import TinyTransformer
from latentae.keyed import digest, generator

__all__ = ["EVALUATIONS", "Fitted", "draw", "fit_flow"]

LEARNING_RATE, WARMUP = 2e-3, 0.05  # linear warmup over 5 % of the steps, then a cosine to 0
INTERVALS = 25
EVALUATIONS = 2 * INTERVALS  # of the network for one sample, by Heun's method
LAST = 0.25  # share of the steps whose mean loss is reported


@dataclass(frozen=True)
class Fitted:
    """A trained flow.

    Attributes:
        network: in evaluation mode.
        loss: mean over the last quarter of the steps; None without steps, or if training diverged.
        diverged: whether training stopped at a NaN or infinite loss.
    """

    network: TinyTransformer
    loss: float | None
    diverged: bool = False


@torch.inference_mode(False)
@torch.enable_grad()
def fit_flow(
    latents: Latents,
    whitening: Whitening,
    *,
    steps: int,
    batch: int,
    seed: int,
    device: torch.device | None = None,
    advance: Callable[[float], None] = lambda loss: None,
) -> Fitted:
    """Train a flow on samples of posteriors, drawn anew in each step.

    Args:
        latents: posteriors of one shape.
        whitening: of their samples.
        steps: optimizer steps.
        batch: latents per step, drawn with replacement.
        seed: of weights, latents, times and noise.
        device: where to train.
        advance: called with the loss after each step.
    """
    z, h, w = latents.means[0].shape
    network = TinyTransformer((z, h, w), seed=digest(seed, "weights") >> 1).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * _schedule(step, steps)
        loss = _loss(network, *_batch(latents, whitening, batch, seed, step, device))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Fitted(network.eval(), None, diverged=True)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        advance(losses[-1])
    last = losses[-max(round(LAST * steps), 1) :]
    return Fitted(network.eval(), sum(last) / len(last) if last else None)


@torch.inference_mode()
def draw(network: TinyTransformer, count: int, *, seed: int, batch: int = 64, start: int = 0) -> Tensor:
    """Draw whitened samples.

    Args:
        network: a trained flow's.
        count: number of samples.
        seed: of the noise.
        batch: samples at a time; does not change them.
        start: number of the first sample; a sample depends only on its number and the seed.

    Returns:
        fp32 [count, z, h, w].
    """
    device = next(network.parameters()).device
    parts = []
    for first in range(start, start + count, batch):
        generators = [
            generator(seed, "sample", number, hashed=digest)
            for number in range(first, min(first + batch, start + count))
        ]
        z = torch.stack([torch.randn(network.shape, generator=each) for each in generators]).to(device)
        for interval in range(INTERVALS):
            z = _heun(network, z, interval / INTERVALS, 1 / INTERVALS)
        parts.append(z)
    return torch.cat(parts)


def _heun(network: TinyTransformer, z: Tensor, t: float, step: float) -> Tensor:
    """One step of Heun's method, the mean of the velocities at both ends."""
    times = z.new_full((len(z),), t)
    velocity = network(z, times)
    return z + 0.5 * step * (velocity + network(z + step * velocity, times + step))


def _schedule(step: int, steps: int) -> float:
    rise = (step + 1) / max(WARMUP * steps, 1.0)
    return min(rise, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _batch(
    latents: Latents, whitening: Whitening, batch: int, seed: int, step: int, device: torch.device | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Whitened samples, noise [B, z, h, w] and times [B], stratified for a steadier loss."""
    source = generator(seed, "step", step, hashed=digest)
    rows = torch.randint(len(latents), (batch,), generator=source).tolist()
    mean, std = (torch.stack([column[row] for row in rows]) for column in (latents.means, latents.stds))
    z = whitening.whiten(mean + std * torch.randn(mean.shape, generator=source))
    noise = torch.randn(mean.shape, generator=source)
    times = (torch.arange(batch) + torch.rand(batch, generator=source)) / batch
    return z.to(device), noise.to(device), times.to(device)


def _loss(network: TinyTransformer, z: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    mixed = torch.lerp(noise, z, t.view(-1, 1, 1, 1))
    return (network(mixed, t) - (z - noise)).square().mean()
