"""The layers of the LDM autoencoder; attribute names give diffusers' state-dict keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from latentae.models.layer_steps import (
    Pending,
    attend,
    convolve,
    is_unhooked,
    residual_step,
    upsample_convolve,
)

__all__ = [
    "Attention",
    "Block",
    "Chain",
    "Downsample",
    "Level",
    "MidBlock",
    "ResnetBlock",
    "Upsample",
    "group_norm",
    "recomputed",
    "run_block",
]


class Block(nn.Module, ABC):
    """A block of tensors. In a chain it leaves its last additions pending."""

    @abstractmethod
    def step(self, x: Pending) -> Pending:
        """Run the block; its last additions stay pending."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the block's output."""
        return self.step(Pending(x)).value()


class Chain(Block):
    """Blocks in sequence. [B, C, H, W] -> the output of the last block."""

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in the order in which they run."""

    def step(self, x: Pending, checkpointing: bool = False) -> Pending:
        """Run the blocks; `checkpointing` stores only their inputs."""
        for block in self.blocks():
            x = run_block(block, x, checkpointing)
        return x


def run_block(block: nn.Module, x: Pending, checkpointing: bool = False) -> Pending:
    """Run a block, or every block of a chain, with the least memory that its gradient needs.

    A frozen block with frozen input runs as in inference: no graph, additions in place. With
    `checkpointing` the other blocks keep only their input (Chen et al. 2016, "Training Deep Nets
    with Sublinear Memory Cost"). A block that is replaced or hooked is called as a module.
    """
    own = type(block).forward is Block.forward and _is_quiet(block)
    if own and isinstance(block, Chain):
        return block.step(x, checkpointing)
    step = block.step if own and isinstance(block, Block) else _called(block)
    if not torch.is_grad_enabled():
        return step(x)
    if not any(t is not None and t.requires_grad for t in x) and _is_frozen(block):
        with torch.no_grad():
            return step(x)
    return recomputed(step, x) if checkpointing else step(x)


def _called(block: nn.Module) -> Callable[[Pending], Pending]:
    return lambda x: Pending(block(x.value()))


def _is_quiet(module: nn.Module) -> bool:
    """Whether a call may be skipped: no hooks, and no export, which names operators by calls."""
    return is_unhooked(module) and not torch.compiler.is_exporting()


def _is_frozen(block: nn.Module) -> bool:
    """Whether nothing in a block is trained; a hook may add a tensor that is."""
    trained = any(parameter.requires_grad for parameter in block.parameters())
    return not trained and all(is_unhooked(module) for module in block.modules())


def recomputed(step: Callable[[Pending], Pending], x: Pending) -> Pending:
    """`step(x)`, run again in the backward pass instead of stored.

    Pending additions are computed first, because one sum takes less memory than its parts. No block
    draws random numbers, so no generator state is kept.
    """

    def plain(value: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(step(Pending(value)))

    return Pending(*checkpoint(plain, x.value(), use_reentrant=False, preserve_rng_state=False))  # pyright: ignore


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """GroupNorm with LDM's eps, 1e-6."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(Block):
    """Two norm-activation-convolution steps around a skip; a 1x1 convolution changes its width."""

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
    """A convolution that halves height and width, padded only at right and bottom, as in LDM."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def step(self, x: Pending) -> Pending:
        """[B, C, H, W] -> [B, C, H/2, W/2]."""
        return convolve(self.conv, F.pad(x.value(), (0, 1, 0, 1)), stride=2, padding=0)


class Upsample(Block):
    """Nearest-neighbor doubling of height and width, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def step(self, x: Pending) -> Pending:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return upsample_convolve(self.conv, x.value())


class MidBlock(Chain):
    """Residual block, optional attention, residual block. [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, groups)] if attention else [])
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])

    def blocks(self) -> Iterator[nn.Module]:
        """Residual block, attention if there is one, residual block."""
        yield self.resnets[0]
        yield from self.attentions
        yield self.resnets[1]


class Level(Chain):
    """Residual blocks with optional attention at one resolution, then a change of resolution.

    [B, C_in, H, W] -> [B, C_out, H', W'].

    Args:
        in_channels: of the input.
        out_channels: of the output.
        layers: number of residual blocks.
        groups: of every GroupNorm.
        attention: whether attention follows each residual block.
        resample: the last block, or None to keep the resolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        layers: int,
        groups: int,
        attention: bool,
        resample: type[Downsample | Upsample] | None,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * (layers - 1)
        self.resnets = nn.ModuleList([ResnetBlock(width, out_channels, groups) for width in widths])
        attentions = [Attention(out_channels, groups) for _ in range(layers * attention)]
        self.attentions = nn.ModuleList(attentions)
        # two names, as in diffusers' keys
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if resample is Downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample is Upsample else [])

    def blocks(self) -> Iterator[nn.Module]:
        """Residual blocks, each with its attention, then the change of resolution."""
        for index, resnet in enumerate(self.resnets):
            yield resnet
            yield from self.attentions[index : index + 1]
        yield from self.downsamplers
        yield from self.upsamplers
