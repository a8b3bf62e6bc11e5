"""Start a deep-compression autoencoder at PCA.

The trunk carries patches and the branches add nothing yet.

arXiv 2311.10699 starts small fully connected autoencoders at PCA; this construction is ours
(docs/decisions/0017). A *map of patches* is a tensor [m, C, f, f]: m inner products with a patch of
f x f pixels, or m patches to draw.

**Encoder.** With branches that add nothing it is linear, and if its convolutions read only their
center, each pixel of a map is w numbers of the patch behind it. These numbers are known exactly,
the shortcut's averages included. Convolutions whiten them. With more channels they add random
mixtures; with fewer they keep what predicts the components best (reduced-rank regression, Izenman
1975). The last one reads off the components.

**Decoder.** The shortcut of a doubling reads the pixel that the convolution's center reads. So the
convolution can cancel it and be any linear map from a pixel to its four. A level's *frame* [r, C,
f, f] are the patches that r of its channels draw, scaled for values of variance one: the leading
left singular vectors of all parts of that size of the components. The finest level carries each
number x of its patch as x and -x, because act(x) - act(-x) = x for every activation x * s(x) with
s(x) + s(-x) = 1. It also carries one large constant, by which the last RMSNorm divides everywhere
alike, except for a small error that grows with x^2 / constant^2.

In bf16 the trunk may be wider than the values that a convolution reads from it, and cancelling
leaves an error of 2^-9. So if the widths allow it, the shortcut of the channels that carry a level
reads channels that are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentae.errors import ModelError
from latentae.models.config import AutoencoderDCConfig
from latentae.models.dc.autoencoder import AutoencoderDC, DCDecoder, DCEncoder
from latentae.models.dc.blocks import Down, ResidualBlock, Up
from latentae.models.initialization import start_linear
from latentae.models.pca import PatchBasis, image_patches

__all__ = ["check_head_start", "start_at_pca"]

ODD = ("relu", "silu", "swish", "gelu")  # act(x) - act(-x) = x
SMALLEST_SPREAD = 0.01
"""Smallest standard deviation, on the [0, 255] scale, that a component is divided by."""

EXACT = 1e-6  # share of a component's variance whose loss is no loss
GAIN = 5.0
"""Scale of what a halving with too few channels keeps, over the means that its shortcut adds."""
ROUNDING = 1e-9  # share of the largest variance that is only rounding
FLOOR = 0.1
"""Share of the mean variance added before whitening, so that bf16's rounding is not amplified."""

SIGNAL = 0.5
"""Share of a pixel's value in the finest level: bf16 blurs a small one."""
DOMINANCE = 4000.0
"""Energy of the constant over that of the rest: a small one makes the last RMSNorm inexact."""
FAINTEST = 1e-5  # share of the largest singular value below which nothing is carried


def check_head_start(config: AutoencoderDCConfig) -> None:
    """Check that a model of this shape can start at PCA.

    Raises:
        ModelError: its decoder doubles by 'interpolate', ends in an activation that is not odd, or
            is too narrow.
    """
    if config.upsample_block_type == "interpolate":
        raise ModelError(
            "upsample_block_type is 'interpolate', which gives four pixels equal means with any weights; a "
            "start at PCA needs 'pixel_shuffle'"
        )
    act = config.decoder_conv_act_fn
    if act.lower() not in ODD:
        raise ModelError(
            f"decoder_conv_act_fn is {act!r}, which no pair of channels passes exactly; a start at PCA "
            f"needs one of {', '.join(ODD)}"
        )
    finest = 0 if config.decoder_layers_per_block[0] else 1
    width, numbers = config.decoder_block_out_channels[finest], config.in_channels * 4**finest
    if width < 2 * numbers + 1:
        raise ModelError(
            f"the decoder's finest level has {width} channels, but a start at PCA carries {numbers} numbers "
            f"in pairs and one constant there; give it {2 * numbers + 1} or more"
        )


@torch.no_grad()
def start_at_pca(
    model: AutoencoderDC, pca: PatchBasis, images: Tensor | Sequence[Tensor], *, whiten: bool = True
) -> None:
    """Set the weights so that encoding is PCA of f x f patches and decoding its reconstruction.

    All weights of the trunk are replaced. Residual branches keep random weights and end in a
    normalization that gives zero. A posterior's log-variance starts at 0. If a level has too few
    channels for its patch, the encoder keeps what predicts the components best, and the decoder the
    directions of largest variance.

    Args:
        model: on any device, in any floating-point type; the weights are computed in fp64 and
            rounded.
        pca: `config.latent_channels` components of patches of `config.downsampling` pixels.
        images: uint8 [N, C, H, W], or such batches, that `pca` was fitted on; variances are
            measured on them.
        whiten: divide the components by their standard deviation, so that each latent channel has
            variance one.

    Raises:
        ModelError: `pca` has another shape, or the model can't start at PCA (`check_head_start`).
        ImageError: sides of `images` that the patch does not divide.
    """
    check_head_start(model.config)
    _check_shape(model, pca)
    start_linear(model)
    sample = _PatchSample([images] if isinstance(images, Tensor) else images)
    shape = (pca.channels, pca.patch, pca.patch)
    basis = pca.basis.double().T.reshape(-1, *shape)
    spread = torch.ones(len(basis)).double()
    if whiten:
        spread = pca.variances.double().sqrt().clamp(min=SMALLEST_SPREAD) / 127.5
    offset = (pca.mean.double() / 127.5 - 1).reshape(shape) - sample.color[:, None, None]
    wanted = basis / spread[:, None, None, None]
    latent = _start_encoder(model.encoder, wanted, spread, offset, sample)
    drawn = basis * spread[:, None, None, None] if latent is wanted else sample.prediction(latent)
    _start_decoder(model.decoder, drawn, offset, sample)


def _check_shape(model: AutoencoderDC, pca: PatchBasis) -> None:
    config = model.config
    found = (pca.components, pca.patch, pca.channels)
    if found != (config.latent_channels, config.downsampling, config.in_channels):
        raise ModelError(
            f"PCA has {found[0]} components of patches of {found[1]} pixels with {found[2]} channels, the "
            "autoencoder "
            f"{config.latent_channels} latent channels, f{config.downsampling} and {config.in_channels} "
            "image channels; fit PCA for it"
        )


class _PatchSample:
    """Patches of uint8 images [B, C, H, W] minus their mean color, on the scale of [-1, 1].

    Attributes:
        color: fp64 [C], the mean of all pixels.
    """

    def __init__(self, images: Sequence[Tensor]) -> None:
        self.images = images
        total = torch.stack([batch.double().sum((0, 2, 3)) for batch in images]).sum(0)
        self.color = total / sum(batch[:, 0].numel() for batch in images) / 127.5 - 1

    def moments(self, numbers: Tensor, others: Tensor | None = None) -> Tensor:
        """Second moments, fp64 [m, n], of `numbers` [m, C, f, f] and `others` [n, C, f, f]."""
        left = numbers.flatten(1).T
        right = left if others is None else others.flatten(1).T
        total, count = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64), 0
        for patches in self._patches(numbers.shape[-1], 4096 + 10 * left.shape[1]):
            values = patches @ left
            total += values.T @ (values if others is None else patches @ right)
            count += len(patches)
        return total / count

    def prediction(self, numbers: Tensor) -> Tensor:
        """Patches [m, C, f, f] whose sum, weighted by a patch's `numbers`, fits it best."""
        flat = numbers.flatten(1)
        products, total = torch.zeros(len(flat), len(flat), dtype=torch.float64), torch.zeros_like(flat)
        for patches in self._patches(numbers.shape[-1], 4096 + 10 * len(flat)):
            values = patches @ flat.T
            products += values.T @ values
            total += values.T @ patches
        inverse = torch.linalg.pinv(products, hermitian=True)  # a number may be constant
        return (inverse @ total).reshape(numbers.shape)

    def _patches(self, size: int, wanted: int) -> Iterator[Tensor]:
        """About `wanted` patches of all images: fp64 [n, C * size * size] at a time."""
        count = sum(batch[:, 0].numel() for batch in self.images) // size**2
        step, seen = max(1, count // wanted), 0
        color = self.color.repeat_interleave(size * size)
        for batch in self.images:
            found = image_patches(batch, size).flatten(0, 1)
            yield found[-seen % step :: step] / 127.5 - 1 - color
            seen += len(found)


def _joined(numbers: Tensor) -> Tensor:
    """[m, C, f, f] -> [4m, C, 2f, 2f]: as `pixel_unshuffle` of the map."""
    m, channels, f, _ = numbers.shape
    out = numbers.new_zeros(m, 2, 2, channels, 2, f, 2, f)
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
        out[:, y, x, :, y, :, x] = numbers
    return out.reshape(4 * m, channels, 2 * f, 2 * f)


def _parts(numbers: Tensor, f: int) -> Tensor:
    """[m, C, F, F] -> [m, (F / f)^2, C, f, f]: squares of f pixels, row by row."""
    m, channels, size, _ = numbers.shape
    n = size // f
    squares = numbers.reshape(m, channels, n, f, n, f).permute(0, 2, 4, 1, 3, 5)
    return squares.reshape(m, n * n, channels, f, f)


def _start_encoder(
    encoder: DCEncoder, components: Tensor, spread: Tensor, offset: Tensor, sample: _PatchSample
) -> Tensor:
    """Make the latent `components` [z, C, f, f] of the patch minus mean color and `offset` [C, f,
    f].

    The error of a component is weighted by its `spread` [z], the size of what it draws.

    Returns:
        The latent's map of patches: `components`, or the nearest to it if levels are too narrow.
    """
    start = _EncoderStart(components, components * spread[:, None, None, None], sample)
    pixel = torch.eye(components.shape[1], dtype=torch.float64)[:, :, None, None]
    if isinstance(encoder.conv_in, Down):
        first, numbers = encoder.conv_in.conv, start.down(encoder.conv_in, pixel)
    else:
        assert isinstance(encoder.conv_in, nn.Conv2d)
        first, numbers = encoder.conv_in, start.plain(encoder.conv_in, pixel)
    assert first.bias is not None
    first.bias.copy_(-(first.weight.double().sum((2, 3)) @ sample.color.to(first.weight.device)))
    for level in encoder.down_blocks:
        for step in level:  # pyright: ignore[reportGeneralTypeIssues]
            if isinstance(step, Down):
                numbers = start.down(step, numbers)
    return start.last(encoder, numbers, offset)


class _EncoderStart:
    """Sets an encoder's convolutions; `numbers` [w, C, f, f] describe a map's channels."""

    def __init__(self, components: Tensor, weighted: Tensor, sample: _PatchSample) -> None:
        self.components, self.weighted, self.sample, self.lossless = components, weighted, sample, True
        self.generator = torch.Generator().manual_seed(0)

    def plain(self, conv: nn.Conv2d, numbers: Tensor) -> Tensor:
        """Set a convolution without stride."""
        rows = self._rows(numbers, conv.out_channels)
        _set_center(conv, rows)
        return _combined(rows, numbers)

    def down(self, down: Down, numbers: Tensor) -> Tensor:
        """Set a halving."""
        neighbors = _joined(numbers)
        if down.strided:  # its window covers all four neighbors, so it can undo the shortcut
            rows = self._rows(neighbors, down.out_channels)
            own = rows - _group_means(rows) if down.shortcut else rows
            nn.init.zeros_(down.conv.weight)
            down.conv.weight[:, :, 1:, 1:] = own.unflatten(1, (-1, 2, 2)).to(down.conv.weight)
            return _combined(rows, neighbors)
        out = _joined(self.plain(down.conv, numbers))
        return out + neighbors.unflatten(0, (down.out_channels, -1)).mean(1) if down.shortcut else out

    def last(self, encoder: DCEncoder, numbers: Tensor, offset: Tensor) -> Tensor:
        """Set the last convolution; returns the latent's map of patches."""
        if self.lossless:
            wanted = self.components.flatten(1).T
            rows = torch.linalg.lstsq(numbers.flatten(1).T, wanted, driver="gelsd").solution.T
        else:
            rows = self._predicting(numbers)
        latent = self.components if self.lossless else _combined(rows, numbers)
        _set_center(encoder.conv_out, rows - _group_means(rows) if encoder.out_shortcut else rows)
        assert encoder.conv_out.bias is not None
        encoder.conv_out.bias.copy_(-(latent.flatten(1) @ offset.flatten()))
        return latent

    def _predicting(self, numbers: Tensor) -> Tensor:
        """[z, w]: the combinations of the numbers that are nearest to the components."""
        moments, cross = self.sample.moments(numbers), self.sample.moments(numbers, self.components)
        moments.diagonal().add_(ROUNDING * moments.diagonal().mean())
        rows = torch.linalg.solve(moments, cross).T
        variances = self.sample.moments(self.components).diagonal()
        self.lossless = bool(((rows * cross.T).sum(1) > (1 - EXACT) * variances).all())
        return rows

    def _rows(self, numbers: Tensor, count: int) -> Tensor:
        """Combinations [count, w] that keep everything, or what predicts the components best."""
        moments = self.sample.moments(numbers)
        values, vectors = torch.linalg.eigh(moments)
        kept = values > ROUNDING * values[-1]
        values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
        if len(values) > count:
            self.lossless = False
            best = self._best(numbers, vectors.T / values.sqrt()[:, None], count)
            return (
                GAIN * moments.diagonal().mean().sqrt() * best
            )  # the shortcut's means have the input's size
        whitened = vectors.T / (values + FLOOR * values.mean()).sqrt()[:, None]
        shape = (count - len(whitened), len(whitened))
        mixtures = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return torch.cat([whitened, mixtures / mixtures.norm(dim=1, keepdim=True) @ whitened])

    def _best(self, numbers: Tensor, whitened: Tensor, count: int) -> Tensor:
        """`count` rows: leading left singular vectors of the regression of the components."""
        wanted = _parts(self.weighted, numbers.shape[-1]).flatten(0, 1)
        regression = whitened @ self.sample.moments(numbers, wanted)
        leading = torch.linalg.svd(regression, full_matrices=False)[0][:, :count]
        # remaining channels keep the largest variances, which tell what the shortcut adds
        most = torch.eye(len(whitened), dtype=torch.float64)[:, : count - leading.shape[1]]
        return torch.linalg.qr(torch.cat([leading, most], dim=1))[0].T @ whitened


def _set_center(conv: nn.Conv2d, rows: Tensor) -> None:
    """Make a convolution `rows` [out, in] of its center pixel, without a bias."""
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, 1, 1] = rows.to(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _combined(rows: Tensor, numbers: Tensor) -> Tensor:
    return torch.einsum("kw,wcyx->kcyx", rows, numbers)


def _group_means(rows: Tensor) -> Tensor:
    """The matrix, shaped as `rows`, of a shortcut that averages groups of inputs."""
    count, width = rows.shape
    return torch.eye(count, dtype=rows.dtype).repeat_interleave(width // count, dim=1) / (width // count)


@dataclass(frozen=True)
class _Stage:
    """A convolution of the decoder's trunk with its shortcut, and the frame of its map.

    Attributes:
        conv: its `phases` outputs for one channel of the map are adjacent.
        width: channels of the map.
        phases: 4 if it doubles, else 1.
        repeats: how often the shortcut repeats each input channel; 0 without a shortcut.
        frame: [r, C, f, f].
        carriers: the channel of each member of the frame.
    """

    conv: nn.Conv2d
    width: int
    phases: int
    repeats: int
    frame: Tensor
    carriers: list[int]

    @property
    def sources(self) -> set[int]:
        """Input channels that the shortcut adds to the carriers."""
        outputs = (self.phases * channel + phase for channel in self.carriers for phase in range(self.phases))
        return {output // self.repeats for output in outputs} if self.repeats else set()


def _start_decoder(decoder: DCDecoder, components: Tensor, offset: Tensor, sample: _PatchSample) -> None:
    """Draw `components` [z, C, f, f] times the latent, plus mean color and `offset` [C, f, f]."""
    stages = _stages(decoder, torch.cat([components, offset[None]]))
    frame, carriers, quiet = components, list(range(len(components))), set[int]()
    for stage, following in zip(stages, [*stages[1:], None], strict=True):
        spare = set(range(stage.width)) if following is None else following.sources
        _write(stage, frame, carriers, quiet, spare - set(stage.carriers))
        if frame is components:
            _add(stage, stage.carriers, torch.linalg.pinv(stage.frame.flatten(1).T) @ offset.flatten())
        frame, carriers, quiet = stage.frame, stage.carriers, spare - set(stage.carriers)
    _start_output(decoder, stages[-1], sample)


def _stages(decoder: DCDecoder, members: Tensor) -> list[_Stage]:
    ups = [step for level in reversed(decoder.up_blocks) for step in level if isinstance(step, Up)]  # pyright: ignore
    first = decoder.width // decoder.conv_in.in_channels if decoder.in_shortcut else 0
    shapes = [(decoder.conv_in, decoder.width, 1, first)]
    for up in ups:
        repeats = 4 * up.out_channels // up.conv.in_channels * up.shortcut
        shapes.append((up.conv, up.out_channels, 4, repeats))
    stages = []
    for number, (conv, width, phases, repeats) in enumerate(shapes):
        size = members.shape[-1] >> number
        frame = _pairs(members.shape[1], size) if number == len(ups) else _frame(members, size, width)
        # carriers are the first and the last channels in turn: so the sources of the next carriers
        # are free
        begin = width - len(frame) if number % 2 else 0
        stages.append(_Stage(conv, width, phases, repeats, frame, list(range(begin, begin + len(frame)))))
    return stages


def _frame(members: Tensor, size: int, width: int) -> Tensor:
    """At most `width` patches [r, C, size, size] that span the parts of all members best."""
    if size == members.shape[-1]:
        return members[:width]
    squares = _parts(members, size)
    _, values, vectors = torch.linalg.svd(squares.flatten(0, 1).flatten(1), full_matrices=False)
    rank = min(int((values > FAINTEST * values[0]).sum()), width)
    spread = values[:rank] / squares.shape[1] ** 0.5
    return (vectors[:rank] * spread[:, None]).unflatten(1, (members.shape[1], size, size))


def _pairs(channels: int, size: int) -> Tensor:
    """[2 C size^2, C, size, size]: every number of the patch, then the negative of each."""
    numbers = channels * size * size
    each = torch.eye(numbers, dtype=torch.float64).reshape(numbers, channels, size, size)
    return torch.cat([each, -each]) / (2 * SIGNAL)


def _write(stage: _Stage, frame: Tensor, carriers: list[int], quiet: set[int], spare: set[int]) -> None:
    """Set a convolution that reads `frame` at `carriers`.

    The input channels `quiet` are zero, and so the output channels `spare` become zero. Other
    weights are random, except those of the rest of the input, which is not zero and must not be
    read yet.
    """
    conv, phases = stage.conv, stage.phases
    weight, ignored = conv.weight, torch.ones(conv.in_channels, dtype=torch.bool)
    ignored[[*carriers, *quiet]] = False
    weight.mul_(0.5)
    weight[:, ignored] = 0.0
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    channels = sorted({*stage.carriers, *spare})
    outputs = torch.tensor([phases * channel + phase for channel in channels for phase in range(phases)])
    weight[outputs[:, None], carriers] = 0.0
    if stage.repeats:
        weight[outputs, outputs // stage.repeats] = 0.0
        weight[outputs, outputs // stage.repeats, 1, 1] = -1.0
    # the pseudo-inverse gives a frame's coefficients of a patch, and so the map from one frame to
    # the next
    inverse = torch.linalg.pinv(stage.frame.flatten(1).T)
    maps = torch.einsum("od,ipd->poi", inverse, _parts(frame, stage.frame.shape[-1]).flatten(2))
    for phase in range(phases):
        rows = torch.tensor([phases * channel + phase for channel in stage.carriers])
        weight[rows[:, None], torch.tensor(carriers), 1, 1] += maps[phase].to(weight)


def _add(stage: _Stage, channels: Iterable[int], values: Tensor) -> None:
    """Add constants to channels of a stage's map."""
    bias = stage.conv.bias
    assert bias is not None
    for channel, value in zip(channels, values, strict=True):
        bias[stage.phases * channel : stage.phases * (channel + 1)] += value.to(bias)


def _start_output(decoder: DCDecoder, stage: _Stage, sample: _PatchSample) -> None:
    """Set the finest level's constant, the last normalization and the last convolution."""
    constant = stage.carriers[0] - 1 if stage.carriers[0] else stage.carriers[-1] + 1
    numbers, size = len(stage.frame) // 2, stage.frame.shape[-1]
    pixels = torch.eye(numbers, dtype=torch.float64).reshape(numbers, -1, size, size)
    energy = 2 * SIGNAL**2 * sample.moments(pixels).trace().item() + 1e-3
    _add(stage, [constant], torch.tensor([(DOMINANCE * energy) ** 0.5]))
    norm = decoder.norm_out
    nn.init.constant_(norm.weight, ((1 + DOMINANCE) * energy / stage.width) ** 0.5)
    nn.init.zeros_(norm.bias)
    norm.weight[constant] = 0.0
    conv = decoder.conv_out.conv if isinstance(decoder.conv_out, Up) else decoder.conv_out
    conv.weight[:, [*stage.carriers, constant]] = 0.0
    for number in range(numbers):  # in the order of the channels that `pixel_shuffle` reads
        conv.weight[number, stage.carriers[number], 1, 1] = 1 / SIGNAL
        conv.weight[number, stage.carriers[numbers + number], 1, 1] = -1 / SIGNAL
    assert conv.bias is not None
    conv.bias.copy_(sample.color.repeat_interleave(size * size))
    for step in next(level for level in decoder.up_blocks if len(level)):  # pyright: ignore
        if isinstance(step, ResidualBlock):  # otherwise it would read hardly anything but the constant
            step.conv1.weight[:, constant] = 0.0
