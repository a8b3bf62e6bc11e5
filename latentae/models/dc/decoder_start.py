"""The decoder's half of a start at PCA.

The shortcut of a doubling reads the very pixel that the convolution's centre reads, so the convolution can cancel it, and be any linear
map from a pixel to its four. A level's *frame* [r, C, f, f] are the patches that r of its channels draw, times their values of variance
one: the leading left singular vectors of all that the components have at any place of that size. The finest level carries each number x
of its patch as x and -x, because act(x) - act(-x) = x for every activation x * s(x) with s(x) + s(-x) = 1, and one large constant, by
which the last RMSNorm divides everywhere alike, but for a small error that grows with x^2 / constant^2.

In bf16 the trunk may be wider than what a convolution reads of it, and then cancelling leaves 2^-9 of what was there. So the channels that
carry a level are those whose shortcut reads channels that are zero, where the widths leave room for it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentae.models.dc.autoencoder import DCDecoder
from latentae.models.dc.blocks import ResidualBlock, Up
from latentae.models.dc.patches import PatchSample, parts

__all__ = ["narrowest", "start_decoder"]

SIGNAL = 0.5
"""What the finest level carries of a pixel's value. bf16 blurs a small one, beside what the shortcut brings; a large one asks for a large
constant."""
DOMINANCE = 4000.0
"""Energy of the constant over that of all it dominates: the error of the last RMSNorm falls with it, but a large constant disturbs what
learns at the finest level."""
FAINTEST = 1e-5  # of the largest singular value: less is not carried


@dataclass(frozen=True)
class _Stage:
    """A convolution of the trunk with what lies beside it, and what its map is to carry.

    Attributes:
        conv: its `phases` outputs for each channel of the map are next to each other.
        width: channels of the map.
        phases: 4 where it doubles, else 1.
        repeats: how often the shortcut repeats each input channel; 0 without one.
        frame: [r, C, f, f].
        places: the channel of each member of the frame.
    """

    conv: nn.Conv2d
    width: int
    phases: int
    repeats: int
    frame: Tensor
    places: list[int]

    @property
    def sources(self) -> set[int]:
        """Input channels that the shortcut adds to `places`."""
        if not self.repeats:
            return set()
        return {
            (self.phases * place + phase) // self.repeats
            for place in self.places
            for phase in range(self.phases)
        }


def narrowest(channels: int, size: int) -> int:
    """Channels that the finest level takes: pairs of the numbers of its patch [channels, size, size], and a constant."""
    return 2 * channels * size**2 + 1


def start_decoder(decoder: DCDecoder, components: Tensor, offset: Tensor, sample: PatchSample) -> None:
    """Draw `components` [z, C, f, f] times the latent about the mean colour plus `offset` [C, f, f].

    The finest level is as wide as `narrowest` says, or wider.
    """
    members = torch.cat([components, offset[None]])
    stages = _stages(decoder, members)
    frame, places, quiet = components, list(range(len(components))), set[int]()
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        spare = set(range(stage.width)) if following is None else following.sources
        _write(stage, frame, places, quiet, spare - set(stage.places))
        if frame is components:
            _add(stage, stage.places, torch.linalg.pinv(stage.frame.flatten(1).T) @ offset.flatten())
        frame, places, quiet = stage.frame, stage.places, spare - set(stage.places)
    _start_output(decoder, stages[-1], sample)


def _stages(decoder: DCDecoder, members: Tensor) -> list[_Stage]:
    ups = [step for level in reversed(decoder.up_blocks) for step in level if isinstance(step, Up)]  # pyright: ignore
    first = decoder.width // decoder.conv_in.in_channels if decoder.in_shortcut else 0
    shapes = [(decoder.conv_in, decoder.width, 1, first)]
    shapes += [
        (up.conv, up.out_channels, 4, 4 * up.out_channels // up.conv.in_channels * up.shortcut) for up in ups
    ]
    stages = []
    for number, (conv, width, phases, repeats) in enumerate(shapes):
        size = members.shape[-1] >> number
        frame = _pairs(members.shape[1], size) if number == len(ups) else _frame(members, size, width)
        # carried at the front and at the end by turns: what feeds the next carriers is then free
        begin = width - len(frame) if number % 2 else 0
        stages.append(_Stage(conv, width, phases, repeats, frame, list(range(begin, begin + len(frame)))))
    return stages


def _frame(members: Tensor, size: int, width: int) -> Tensor:
    """[r, C, size, size], r at most `width`: what spans the squares of all members best, scaled for coefficients of variance one."""
    if size == members.shape[-1]:
        return members[:width]
    squares = parts(members, size)
    _, values, vectors = torch.linalg.svd(squares.flatten(0, 1).flatten(1), full_matrices=False)
    rank = min(int((values > FAINTEST * values[0]).sum()), width)
    spread = values[:rank] / squares.shape[1] ** 0.5
    return (vectors[:rank] * spread[:, None]).unflatten(1, (members.shape[1], size, size))


def _pairs(channels: int, size: int) -> Tensor:
    """[2 C size^2, C, size, size]: every number of the patch, then every number's negative."""
    numbers = channels * size * size
    each = torch.eye(numbers, dtype=torch.float64).reshape(numbers, channels, size, size)
    return torch.cat([each, -each]) / (2 * SIGNAL)


def _write(stage: _Stage, frame: Tensor, places: list[int], quiet: set[int], spare: set[int]) -> None:
    """Set a convolution that reads `frame` at `places`; `quiet` input channels are zero, and so shall `spare` outputs be.

    What is left of the weights is random, but for the rest of the input, which is not zero and must not be read by anyone yet.
    """
    conv, phases = stage.conv, stage.phases
    weight, ignored = conv.weight, torch.ones(conv.in_channels, dtype=torch.bool)
    ignored[[*places, *quiet]] = False
    weight.mul_(0.5)
    weight[:, ignored] = 0.0
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    outputs = torch.tensor(
        [phases * c + phase for c in sorted({*stage.places, *spare}) for phase in range(phases)]
    )
    weight[outputs[:, None], places] = 0.0
    if stage.repeats:
        weight[outputs, outputs // stage.repeats] = 0.0
        weight[outputs, outputs // stage.repeats, 1, 1] = -1.0
    # a frame's coefficients of a patch, and so the map from one frame's to another's: its pseudo-inverse
    inverse = torch.linalg.pinv(stage.frame.flatten(1).T)
    maps = torch.einsum("od,ipd->poi", inverse, parts(frame, stage.frame.shape[-1]).flatten(2))
    for phase in range(phases):
        rows = torch.tensor([phases * place + phase for place in stage.places])
        weight[rows[:, None], torch.tensor(places), 1, 1] += maps[phase].to(weight)


def _add(stage: _Stage, channels: Iterable[int], values: Tensor) -> None:
    """Add constants to channels of a stage's map."""
    bias = stage.conv.bias
    assert bias is not None
    for channel, value in zip(channels, values, strict=True):
        bias[stage.phases * channel : stage.phases * (channel + 1)] += value.to(bias)


def _start_output(decoder: DCDecoder, stage: _Stage, sample: PatchSample) -> None:
    """The constant of the finest level, the normalization that it steers, and the convolution that joins the pairs again."""
    constant = stage.places[0] - 1 if stage.places[0] else stage.places[-1] + 1
    numbers, size = len(stage.frame) // 2, stage.frame.shape[-1]
    pixels = torch.eye(numbers, dtype=torch.float64).reshape(numbers, -1, size, size)
    energy = 2 * SIGNAL**2 * sample.moments(pixels).trace().item() + 1e-3
    _add(stage, [constant], torch.tensor([(DOMINANCE * energy) ** 0.5]))
    norm = decoder.norm_out
    nn.init.constant_(norm.weight, ((1 + DOMINANCE) * energy / stage.width) ** 0.5)
    nn.init.zeros_(norm.bias)
    norm.weight[constant] = 0.0
    conv = decoder.conv_out.conv if isinstance(decoder.conv_out, Up) else decoder.conv_out
    conv.weight[:, [*stage.places, constant]] = 0.0
    for number in range(
        numbers
    ):  # the order of a patch's numbers is that of the channels that `pixel_shuffle` reads
        conv.weight[number, stage.places[number], 1, 1] = 1 / SIGNAL
        conv.weight[number, stage.places[numbers + number], 1, 1] = -1 / SIGNAL
    assert conv.bias is not None
    conv.bias.copy_(sample.colour.repeat_interleave(size * size))
    for step in next(level for level in decoder.up_blocks if len(level)):  # pyright: ignore
        if isinstance(step, ResidualBlock):  # else they would see hardly anything but the constant
            step.conv1.weight[:, constant] = 0.0
