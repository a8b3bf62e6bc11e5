"""A small rectified flow on whitened latents, trained for a fixed number of steps and sampled.

Liu et al. 2022; Lipman et al. 2022. With z_0 ~ N(0, I), a latent z_1 and t in [0, 1]: z_t = (1 - t)
z_0 + t z_1, and the loss is E |v(z_t, t) - (z_1 - z_0)|^2. A sample is the solution of dz/dt = v at
t = 1 that starts at z_0. Every random number is keyed by the seed and the step or sample.

The network is a scalable interpolant transformer of 1.5 million parameters: adaLN-Zero (Peebles &
Xie 2022, DiT; Ma et al. 2024, SiT), without classes. Width, depth and heads are fixed; only the
first and the last layer depend on the number of latent channels. The patch is the smallest that
gives at most 64 tokens: side 4 for a 32 x 32 latent, side 1 for an 8 x 8 latent.

Its inputs and outputs are scaled for whitened data, like those of Karras et al. 2022 (EDM), sec. 5
and app. B.6. With z_t of independent unit variances, s^2 = (1 - t)^2 + t^2 is the variance of z_t,
and v = z_1 - z_0 is

    v = (2 t - 1) / s^2  z_t  +  1 / s  F(z_t / s, t)

with F of unit variance. The first term is the best linear prediction from z_t. So a new network,
whose F is 0, maps white noise to white noise, and noise need not pass through tokens narrower than
a patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentae.evaluation.diffusability.latents import Latents, Whitening
from latentae.keyed import digest, generator, whole_seed

__all__ = [
    "EVALUATIONS",
    "Block",
    "Fitted",
    "TinyTransformer",
    "draw",
    "fit_flow",
    "patch_side",
    "positions",
    "waves",
    "zeroed",
]

LEARNING_RATE, WARMUP = 2e-3, 0.05  # linear warmup over 5 % of the steps, then a cosine to 0
INTERVALS = 25
EVALUATIONS = 2 * INTERVALS  # of the network for one sample, by Heun's method
LAST = 0.25  # share of the steps whose mean loss is reported
WIDTH, DEPTH, HEADS, TOKENS = 160, 3, 5, 64


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


def patch_side(height: int, width: int, tokens: int = TOKENS) -> int:
    """Side of the smallest square patch that divides a latent into at most `tokens` tokens."""
    patch = 1
    while math.ceil(height / patch) * math.ceil(width / patch) > tokens:
        patch += 1
    return patch


class TinyTransformer(nn.Module):
    """Velocity of whitened latents of one shape.

    Args:
        shape: z, h, w; sides are zero-padded at the end to multiples of the patch.
        seed: of the weights.
    """

    def __init__(self, shape: tuple[int, int, int], seed: int = 0) -> None:
        super().__init__()
        self.shape, self.patch = shape, patch_side(*shape[1:])
        self.grid = math.ceil(shape[1] / self.patch), math.ceil(shape[2] / self.patch)
        numbers = shape[0] * self.patch**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(whole_seed(seed))
            self.read = nn.Linear(numbers, WIDTH)
            self.time = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
            self.blocks = nn.ModuleList(Block(WIDTH, HEADS) for _ in range(DEPTH))
            self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
            self.modulation = zeroed(nn.Linear(WIDTH, 2 * WIDTH))
            self.write = zeroed(nn.Linear(WIDTH, numbers))
        self.register_buffer("positions", positions(*self.grid, WIDTH), persistent=False)
        self.positions: Tensor

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """Latents z_t [B, z, h, w] at times [B] in [0, 1], 0 being noise -> v [B, z, h, w]."""
        time = t.view(-1, 1, 1, 1)
        variance = (1 - time).square() + time.square()
        tokens = self.read(self._cut(z * variance.rsqrt())) + self.positions
        condition = F.silu(self.time(waves(1000 * t, WIDTH)))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        out = self._join(self.write(self.norm(tokens) * (1 + scale) + shift))
        return (2 * time - 1) / variance * z + variance.rsqrt() * out

    def _cut(self, z: Tensor) -> Tensor:
        """[B, z, h, w] -> tokens [B, n, z p p]."""
        (rows, columns), p = self.grid, self.patch
        z = F.pad(z, (0, columns * p - z.shape[3], 0, rows * p - z.shape[2]))
        patches = z.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 1, 3, 5)
        return patches.flatten(3).flatten(1, 2)

    def _join(self, tokens: Tensor) -> Tensor:
        """The inverse of `_cut`."""
        (rows, columns), p = self.grid, self.patch
        z = tokens.unflatten(1, (rows, columns)).unflatten(3, (self.shape[0], p, p)).permute(0, 3, 1, 4, 2, 5)
        return z.reshape(-1, self.shape[0], rows * p, columns * p)[:, :, : self.shape[1], : self.shape[2]]


class Block(nn.Module):
    """Attention and an MLP, each shifted, scaled and gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = zeroed(nn.Linear(width, 6 * width))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Tokens [B, n, width], condition [B, width] -> tokens."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = parts
        tokens = tokens + gate * self._attend(self.norms[0](tokens) * (1 + scale) + shift)
        return tokens + gate_mlp * self.mlp(self.norms[1](tokens) * (1 + scale_mlp) + shift_mlp)

    def _attend(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """Set a layer to 0, so that a new block changes nothing and a new network returns 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def waves(values: Tensor, width: int) -> Tensor:
    """[n] -> [n, width]: cosines and sines of falling frequency (Vaswani et al. 2017, sec. 3.5)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=values.device) / (width // 2))
    angles = values[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Position embeddings [rows * columns, width]: one half for the row, one for the column."""
    row, column = (waves(torch.arange(side).float(), width // 2) for side in (rows, columns))
    return torch.cat([row.repeat_interleave(columns, 0), column.repeat(rows, 1)], dim=1)
