"""A small diffusion transformer on latents, as a starting point for your own.

Flow matching (Lipman et al. 2022; Liu et al. 2022, rectified flow): with z_0 ~ N(0, I), a latent
z_1 and t in [0, 1],

    z_t = (1 - t) z_0 + t z_1,     loss = E || v(z_t, t, label) - (z_1 - z_0) ||^2,

and sampling integrates dz/dt = v from z_0 to t = 1. The network is a DiT with adaLN-Zero (Peebles &
Xie 2022).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from latentae.encoding.latent_dataset import LatentDataset, SizeBatches
from latentae.evaluation.diffusability.flow import Block, positions, waves, zeroed
from latentae.keyed import whole_seed

__all__ = ["LatentTransformer", "flow_loss", "sample", "train"]


class LatentTransformer(nn.Module):
    """Velocity v(z_t, t, label) of latents [B, z, h, w]; h and w are multiples of `patch`.

    Args:
        channels: z.
        classes: number of class labels; -1 is the label for none.
        width: of a token.
        depth: number of blocks.
        heads: of attention.
        patch: side of the square of a token.
    """

    def __init__(
        self,
        channels: int,
        classes: int = 0,
        width: int = 192,
        depth: int = 4,
        heads: int = 3,
        patch: int = 2,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.patch = channels, width, patch
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)  # the last row is for no label
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.velocity = zeroed(nn.Linear(width, channels * patch**2))

    def forward(self, z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Latents [B, z, h, w], times [B] in [0, 1], labels [B] -> [B, z, h, w]."""
        high, wide = z.shape[2] // self.patch, z.shape[3] // self.patch
        tokens = self.patches(z).flatten(2).transpose(1, 2) + positions(high, wide, self.width).to(z)
        labels = torch.where(labels < 0, self.label.num_embeddings - 1, labels)
        condition = nn.functional.silu(self.time(waves(1000 * t, self.width)) + self.label(labels))
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        out = self.velocity(self.norm(tokens) * (1 + scale) + shift)
        out = out.unflatten(1, (high, wide)).unflatten(3, (self.channels, self.patch, self.patch))
        return out.permute(0, 3, 1, 4, 2, 5).reshape(z.shape)


def flow_loss(
    model: nn.Module, latents: Tensor, labels: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Mean squared error of the velocity at random times; 1 + E[z^2] for a model that gives 0."""
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    t = torch.rand(len(latents), generator=generator).to(latents)
    mixed = torch.lerp(noise, latents, t[:, None, None, None])
    return (model(mixed, t, labels) - (latents - noise)).square().mean()


def train(
    model: LatentTransformer,
    latents: LatentDataset,
    steps: int,
    *,
    batch_size: int = 32,
    lr: float = 1e-3,
    workers: int = 0,
) -> Iterator[float]:
    """Train on a dataset with `scaled=True, sample=True`, and yield the loss of each step.

    Every epoch has new noise and flips.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    batches = SizeBatches(latents, batch_size, drop_last=False)
    loader = DataLoader(latents, batch_sampler=batches, num_workers=workers, persistent_workers=workers > 0)
    epoch, done = 0, 0
    while done < steps and len(latents):
        latents.set_epoch(epoch)
        for _, batch in zip(range(steps - done), loader, strict=False):
            loss = flow_loss(model, batch.latent.to(device), batch.label.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done += 1
            yield loss.item()
        epoch += 1


@torch.inference_mode()
def sample(
    model: LatentTransformer, labels: Tensor, size: tuple[int, int], *, steps: int = 50, seed: int = 0
) -> Tensor:
    """Sample scaled latents [B, z, *size], one per label [B], by Euler steps."""
    device = next(model.parameters()).device
    noise = torch.randn(
        len(labels), model.channels, *size, generator=torch.Generator().manual_seed(whole_seed(seed))
    )
    z, labels = noise.to(device), labels.to(device)
    for step in range(steps):
        t = torch.full((len(labels),), step / steps, device=device)
        z = z + model(z, t, labels) / steps
    return z
