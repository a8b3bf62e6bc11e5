"""The encoder's half of a start at PCA.

With branches that add nothing, the encoder is linear, and so far as its convolutions look at their centre only, each pixel of a map is
w numbers of the patch behind it. They are known exactly, the averages of the shortcuts included. Convolutions whiten what their input
holds; where they have more channels they repeat it in random mixtures, where they have fewer they keep what predicts the components best
(reduced-rank regression, Izenman 1975). The last one reads the components off what has arrived.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentae.models.dc.autoencoder import DCEncoder
from latentae.models.dc.blocks import Down
from latentae.models.dc.patches import PatchSample, blocks, parts

__all__ = ["start_encoder"]

EXACT = 1e-6  # of a component's variance: missing so little is no loss
GAIN = 5.0
"""Of what a halving with too few channels keeps, over the means that its shortcut adds to it."""
NOTHING = 1e-9  # of the largest variance: rounding, not something that the input holds
FLOOR = 0.1
"""Of the mean variance, added to each before whitening: what is faint is not amplified into bf16's rounding."""


def start_encoder(
    encoder: DCEncoder, components: Tensor, spread: Tensor, offset: Tensor, sample: PatchSample
) -> Tensor:
    """Make the latent `components` [z, C, f, f] of the patch about the mean colour plus `offset` [C, f, f].

    An error of a component weighs as much as its `spread` [z], the size of what it draws.

    Returns:
        What the latent is of the patch: `components`, or of the same shape what comes nearest where levels are too narrow.
    """
    start = _EncoderStart(components, components * spread[:, None, None, None], sample)
    pixel = torch.eye(components.shape[1], dtype=torch.float64)[:, :, None, None]
    if isinstance(encoder.conv_in, Down):
        first, numbers = encoder.conv_in.conv, start.down(encoder.conv_in, pixel)
    else:
        assert isinstance(encoder.conv_in, nn.Conv2d)
        first, numbers = encoder.conv_in, start.plain(encoder.conv_in, pixel)
    assert first.bias is not None
    first.bias.copy_(-(first.weight.double().sum((2, 3)) @ sample.colour.to(first.weight.device)))
    for level in encoder.down_blocks:
        for step in level:  # pyright: ignore[reportGeneralTypeIssues]
            if isinstance(step, Down):
                numbers = start.down(step, numbers)
    return start.last(encoder, numbers, offset)


class _EncoderStart:
    """The convolutions of one encoder, from fine to coarse. `numbers` [w, C, f, f] are what a map's channels hold of their patch."""

    def __init__(self, components: Tensor, weighted: Tensor, sample: PatchSample) -> None:
        self.components, self.weighted, self.sample, self.lossless = components, weighted, sample, True
        self.generator = torch.Generator().manual_seed(0)

    def plain(self, conv: nn.Conv2d, numbers: Tensor) -> Tensor:
        """Set a convolution without stride."""
        rows = self._rows(numbers, conv.out_channels)
        _set_centre(conv, rows)
        return _combined(rows, numbers)

    def down(self, down: Down, numbers: Tensor) -> Tensor:
        """Set a halving."""
        neighbours = blocks(numbers)
        if down.strided:  # its window covers all four neighbours, so it can undo the shortcut
            rows = self._rows(neighbours, down.out_channels)
            own = rows - _group_means(rows) if down.shortcut else rows
            nn.init.zeros_(down.conv.weight)
            down.conv.weight[:, :, 1:, 1:] = own.unflatten(1, (-1, 2, 2)).to(down.conv.weight)
            return _combined(rows, neighbours)
        made = blocks(self.plain(down.conv, numbers))
        return made + neighbours.unflatten(0, (down.out_channels, -1)).mean(1) if down.shortcut else made

    def last(self, encoder: DCEncoder, numbers: Tensor, offset: Tensor) -> Tensor:
        """Set the convolution that gives the latent; returns what that is."""
        if self.lossless:
            rows = torch.linalg.lstsq(
                numbers.flatten(1).T, self.components.flatten(1).T, driver="gelsd"
            ).solution.T
        else:
            rows = self._predicting(numbers)
        _set_centre(encoder.conv_out, rows - _group_means(rows) if encoder.out_shortcut else rows)
        assert encoder.conv_out.bias is not None
        latent = self.components if self.lossless else _combined(rows, numbers)
        encoder.conv_out.bias.copy_(-(latent.flatten(1) @ offset.flatten()))
        return latent

    def _predicting(self, numbers: Tensor) -> Tensor:
        """[z, w]: the combinations of the numbers that come nearest to the components."""
        moments, cross = self.sample.moments(numbers), self.sample.moments(numbers, self.components)
        moments.diagonal().add_(NOTHING * moments.diagonal().mean())
        rows = torch.linalg.solve(moments, cross).T
        all_of_it = self.sample.moments(self.components).diagonal()
        self.lossless = bool(((rows * cross.T).sum(1) > (1 - EXACT) * all_of_it).all())
        return rows

    def _rows(self, numbers: Tensor, count: int) -> Tensor:
        """[count, w]: combinations of the numbers that keep all they hold, or what of it predicts the components best."""
        moments = self.sample.moments(numbers)
        values, vectors = torch.linalg.eigh(moments)
        held = values > NOTHING * values[-1]
        values, vectors = values[held].flip(0), vectors[:, held].flip(1)
        if len(values) > count:
            self.lossless = False
            best = self._best(numbers, vectors.T / values.sqrt()[:, None], count)
            return (
                GAIN * moments.diagonal().mean().sqrt() * best
            )  # what the shortcut adds has the size of the input
        whitened = vectors.T / (values + FLOOR * values.mean()).sqrt()[:, None]
        mixtures = self._random(count - len(whitened), len(whitened))
        return torch.cat([whitened, mixtures / mixtures.norm(dim=1, keepdim=True) @ whitened])

    def _best(self, numbers: Tensor, whitened: Tensor, count: int) -> Tensor:
        """`count` rows of unit variance: the leading left singular vectors of the regression of all that is wanted of the patch."""
        wanted = parts(self.weighted, numbers.shape[-1]).flatten(0, 1)
        regression = whitened @ self.sample.moments(numbers, wanted)
        leading = torch.linalg.svd(regression, full_matrices=False)[0][:, :count]
        # room that is left goes to what varies most, from which what the shortcut adds can be told
        most = torch.eye(len(whitened), dtype=torch.float64)[:, : count - leading.shape[1]]
        return torch.linalg.qr(torch.cat([leading, most], dim=1))[0].T @ whitened

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)


def _set_centre(conv: nn.Conv2d, rows: Tensor) -> None:
    """Make a convolution `rows` [out, in] of the pixel at its centre, without a bias."""
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, 1, 1] = rows.to(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _combined(rows: Tensor, numbers: Tensor) -> Tensor:
    return torch.einsum("kw,wcyx->kcyx", rows, numbers)


def _group_means(rows: Tensor) -> Tensor:
    """The matrix, of the shape of `rows`, of a shortcut that gives each output the mean of its own group of inputs."""
    count, width = rows.shape
    return torch.eye(count, dtype=rows.dtype).repeat_interleave(width // count, dim=1) / (width // count)
