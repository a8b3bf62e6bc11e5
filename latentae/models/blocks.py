"""The layers of the LDM autoencoder; attribute names give diffusers' state-dict keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentae.models.pending import Pending, attend, convolve, residual_step, upsample_convolve
from latentae.models.plain import is_unhooked

__all__ = [
    "Attention",
    "Block",
    "Chain",
    "Downsample",
    "MidBlock",
    "ResnetBlock",
    "Upsample",
    "group_norm",
    "is_frozen",
    "recomputed",
    "run_block",
    "run_chain",
]


class Block(nn.Module, ABC):
    """A block that takes and returns tensors, and in a chain of blocks hands on its last additions."""

    @abstractmethod
    def step(self, x: Pending) -> Pending:
        """The block, its last additions pending."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the block's output."""
        return self.step(Pending(x)).value()


def run_block(block: nn.Module, x: Pending, checkpointing: bool) -> Pending:
    """Run a block with the least memory that its gradient needs.

    Frozen blocks with frozen input run as in inference: no graph, additions in place. With `checkpointing` the others keep their
    input only (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost").
    """
    step = _step_of(block)
    if not torch.is_grad_enabled():
        return step(x)
    if not any(t is not None and t.requires_grad for t in x) and is_frozen(block):
        with torch.no_grad():
            return step(x)
    return recomputed(step, x) if checkpointing else step(x)


def is_frozen(block: nn.Module) -> bool:
    """Whether nothing in a block learns. A hook may bring in a tensor that does, so hooked blocks are not frozen."""
    return not any(p.requires_grad for p in block.parameters()) and all(
        is_unhooked(module) for module in block.modules()
    )


def _step_of(block: nn.Module) -> Callable[[Pending], Pending]:
    """The block's step, or a call of a block that is replaced or hooked."""
    if isinstance(block, Block) and type(block).forward is Block.forward and _is_quiet(block):
        return block.step
    return lambda x: Pending(block(x.value()))


def _is_quiet(module: nn.Module) -> bool:
    """Whether skipping a call goes unnoticed: no hooks, and no export, which names operators by the modules that are called."""
    return is_unhooked(module) and not torch.compiler.is_exporting()


def recomputed(step: Callable[[Pending], Pending], x: Pending) -> Pending:
    """`step(x)`, run once more in the backward pass instead of remembered.

    Pending additions are made first: one sum is less to keep than its parts. Nothing here draws random numbers, so no state of a
    generator is kept.
    """

    def plain(value: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(step(Pending(value)))

    return Pending(*checkpoint(plain, x.value(), use_reentrant=False, preserve_rng_state=False))  # pyright: ignore


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """GroupNorm with LDM's eps, 1e-6."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(Block):
    """Two norm-activation-convolution steps around a skip; a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def step(self, x: Pending) -> Pending:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        return residual_step(self, x)


class Attention(Block):
    """Single-head self-attention over all pixels, around a skip."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = group_norm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def step(self, x: Pending) -> Pending:
        """[B, C, H, W] -> the same shape."""
        return attend(self, x)


class Downsample(Block):
    """Halve height and width by a strided convolution, padded at the right and bottom only, as LDM does."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def step(self, x: Pending) -> Pending:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return convolve(self.conv, F.pad(x.value(), (0, 1, 0, 1)), stride=2, padding=0)


class Upsample(Block):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def step(self, x: Pending) -> Pending:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return upsample_convolve(self.conv, x.value())


class Chain(nn.Module, ABC):
    """Blocks one after the other; what they hand on to each other is pending."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in the order in which they run."""

    def step(self, x: Pending, checkpointing: bool = False) -> Pending:
        """The blocks, the last additions pending. `checkpointing` keeps the input of each block only."""
        for block in self.blocks():
            x = run_block(block, x, checkpointing)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the output of the last block."""
        return self.step(Pending(x)).value()


def run_chain(chain: nn.Module, x: Pending, checkpointing: bool) -> Pending:
    """Run a chain of blocks; one that is replaced or hooked is called as a single block."""
    if isinstance(chain, Chain) and type(chain).forward is Chain.forward and _is_quiet(chain):
        return chain.step(x, checkpointing)
    return run_block(chain, x, checkpointing)


class MidBlock(Chain):
    """Residual block, attention (or none), residual block. [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def blocks(self) -> Iterator[nn.Module]:
        """Residual block, attention if there is one, residual block."""
        yield self.resnets[0]
        yield from self.attentions
        yield self.resnets[1]
