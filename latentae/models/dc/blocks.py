"""The layers of the deep-compression autoencoder; their names give diffusers' keys."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from latentae_kernels import conv3x3, row_norm_act
from torch import Tensor, nn

from latentae.models.layer_steps import is_plain, is_plain_conv

__all__ = [
    "ACTIVATIONS",
    "Attention",
    "AttentionBlock",
    "Down",
    "FrozenBatchNorm",
    "GatedConv",
    "RMSNorm",
    "ResidualBlock",
    "Up",
    "add",
    "convolve",
    "grouped_mean",
    "normalize_activate",
    "repeated",
]

EPS = 1e-5
_SMALLEST = 1e-15  # sum of linear attention weights, for a query that no key matches
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "mish": F.mish}
ACTIVATIONS |= {"silu": F.silu, "swish": F.silu}


class RMSNorm(nn.Module):
    """RMSNorm over the channels of each pixel in fp32 (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, act: str = "identity") -> Tensor:
        """[B, C, H, W] -> the same shape; `act` is an activation's name, or "identity"."""
        fused = "silu" if act in ("silu", "swish") else "identity"
        y = row_norm_act(x, self.weight, self.bias, EPS, "rms", fused)
        return y if fused == "silu" or act == "identity" else ACTIVATIONS[act](y)


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch normalization by stored mean and variance, also in training.

    So published models can be fine-tuned with any batch size, number of processes and
    recomputation.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def _normalization(name: str, channels: int) -> nn.Module:
    return RMSNorm(channels) if name == "rms_norm" else FrozenBatchNorm(channels)


class ResidualBlock(nn.Module):
    """Convolution, activation, convolution, normalization around a skip: `ResBlock`."""

    def __init__(self, channels: int, norm: str, act: str) -> None:
        super().__init__()
        self.act = act
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = _normalization(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        h = convolve(self.conv2, ACTIVATIONS[self.act](convolve(self.conv1, x)))
        return add(self.norm(h), x, overwrite=is_plain(self.norm, RMSNorm, FrozenBatchNorm))


class Projection(nn.Module):
    """Queries, keys and values of a window: depthwise convolution, then one per head."""

    def __init__(self, channels: int, heads: int, kernel: int) -> None:
        super().__init__()
        wide = 3 * channels
        self.proj_in = nn.Conv2d(wide, wide, kernel, padding=kernel // 2, groups=wide, bias=False)
        self.proj_out = nn.Conv2d(wide, wide, 1, groups=3 * heads, bias=False)

    def forward(self, qkv: Tensor) -> Tensor:
        """[B, 3C, H, W] -> the same shape."""
        return self.proj_out(self.proj_in(qkv))


class Attention(nn.Module):
    """Multi-scale ReLU linear attention around a skip (Cai et al. 2023, "EfficientViT", eq. 2).

    relu(q) sum_j relu(k_j)^T v_j / relu(q) sum_j relu(k_j)^T for a query q and all keys and values:
    time and memory are linear in the number of pixels. diffusers multiplies in the other order on
    maps with at most `head` pixels; the value is the same.
    """

    def __init__(self, channels: int, head: int, kernels: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.head = head
        heads = channels // head
        inner = heads * head
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, inner, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList([Projection(inner, heads, kernel) for kernel in kernels])
        self.to_out = nn.Linear(inner * (1 + len(kernels)), channels, bias=False)
        self.norm_out = _normalization(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        rows, layers = x.movedim(1, -1), (self.to_q, self.to_k, self.to_v)
        if all(is_plain(layer, nn.Linear) for layer in layers):
            qkv = F.linear(rows, torch.cat([layer.weight for layer in layers])).movedim(-1, 1)
        else:
            qkv = torch.cat([layer(rows) for layer in layers], dim=-1).movedim(-1, 1)
        scales = torch.cat([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], dim=1)
        if torch.is_autocast_enabled(x.device.type):  # sums over all pixels need fp32
            with torch.autocast(x.device.type, enabled=False):
                mixed = linear_attention(scales, self.head)
        else:
            mixed = linear_attention(scales, self.head)
        out = self.to_out(mixed.to(scales.dtype)).movedim(-1, 1)
        return add(self.norm_out(out), x, overwrite=is_plain(self.norm_out, RMSNorm, FrozenBatchNorm))


def linear_attention(qkv: Tensor, head: int) -> Tensor:
    """[B, heads * 3 * head, H, W], q, k, v of each head -> [B, H, W, heads * head], fp32."""
    batch, channels, height, width = qkv.shape
    rows = qkv.to(torch.promote_types(qkv.dtype, torch.float32)).movedim(1, -1)
    rows = rows.reshape(batch, height * width, channels // (3 * head), 3 * head)
    q, k, v = rows.transpose(1, 2).chunk(3, dim=-1)  # [B, heads, HW, head]
    q, k = F.relu(q), F.relu(k)
    total = q @ k.sum(dim=2).unsqueeze(-1)  # [B, heads, HW, 1]
    # clamped: ONNX's optimizer would drop a sum with so small a number
    mixed = (q @ (k.transpose(-1, -2) @ v)) / total.clamp(min=_SMALLEST)
    return mixed.transpose(1, 2).reshape(batch, height, width, channels // 3)


class GatedConv(nn.Module):
    """EfficientViT's gated feed-forward around a skip: diffusers' `GLUMBConv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        h, gate = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return add(self.norm(self.conv_point(h * F.silu(gate))), x, overwrite=is_plain(self.norm, RMSNorm))


class AttentionBlock(nn.Module):
    """Attention, then the gated feed-forward: diffusers' `EfficientViTBlock`."""

    def __init__(self, channels: int, head: int, kernels: tuple[int, ...], norm: str) -> None:
        super().__init__()
        self.attn = Attention(channels, head, kernels, norm)
        self.conv_out = GatedConv(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same shape."""
        return self.conv_out(self.attn(x))


class Down(nn.Module):
    """Halve height and width: a convolution, plus a shortcut that averages moved channels.

    Args:
        in_channels: of the input.
        out_channels: of the output; with a shortcut a divisor of 4 `in_channels`.
        strided: whether the convolution has stride 2; otherwise space is moved to channels after
            it.
        shortcut: whether to add the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, strided: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.out_channels, self.strided, self.shortcut = out_channels, strided, shortcut
        stride, width = (2, out_channels) if strided else (1, out_channels // 4)
        self.conv = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H/2, W/2]."""
        h = self.conv(x) if self.strided else F.pixel_unshuffle(self.conv(x), 2)
        if not self.shortcut:
            return h
        means = grouped_mean(F.pixel_unshuffle(x, 2), self.out_channels)
        return add(h, means, overwrite=is_plain(self.conv, nn.Conv2d))


class Up(nn.Module):
    """Double height and width: a convolution, plus a shortcut that repeats channels.

    Args:
        in_channels: of the input.
        out_channels: of the output; with a shortcut 4 `out_channels` is a multiple of
            `in_channels`.
        interpolate: whether the convolution follows nearest-neighbor doubling; otherwise channels
            are moved to space after it.
        shortcut: whether to add the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, interpolate: bool, shortcut: bool = True) -> None:
        super().__init__()
        self.out_channels, self.interpolate, self.shortcut = out_channels, interpolate, shortcut
        self.conv = nn.Conv2d(in_channels, out_channels if interpolate else 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, 2H, 2W]."""
        h = self.conv(self.to_conv(x))
        h = h if self.interpolate else F.pixel_shuffle(h, 2)
        if not self.shortcut:
            return h
        copies = F.pixel_shuffle(repeated(x, 4 * self.out_channels), 2)
        return add(h, copies, overwrite=is_plain(self.conv, nn.Conv2d))

    def to_conv(self, x: Tensor) -> Tensor:
        """The convolution's input."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.interpolate else x

    def to_conv_output(self, gradient: Tensor) -> Tensor:
        """The gradient at the convolution's output, from the gradient at the block's."""
        return gradient if self.interpolate else F.pixel_unshuffle(gradient, 2)


def grouped_mean(x: Tensor, channels: int) -> Tensor:
    """[B, C, H, W] -> [B, channels, H, W]: the mean of each group of neighboring channels."""
    return x if x.shape[1] == channels else x.unflatten(1, (channels, -1)).mean(dim=2)


def repeated(x: Tensor, channels: int) -> Tensor:
    """[B, C, H, W] -> [B, channels, H, W]: each channel repeated."""
    times = channels // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, dim=1, output_size=channels)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """A 3x3 convolution of stride 1: fused if the layer is plain, else called."""
    return conv3x3(x, conv.weight, conv.bias) if is_plain_conv(conv) else conv(x)


def normalize_activate(norm: nn.Module, x: Tensor, act: str) -> Tensor:
    """Normalization and activation, in one kernel if both are known."""
    return norm(x, act) if is_plain(norm, RMSNorm) else ACTIVATIONS[act](norm(x))


def add(branch: Tensor, skip: Tensor, *, overwrite: bool) -> Tensor:
    """Add a branch to its skip, in place if `overwrite`: the branch is a plain layer's output."""
    keeps = torch.is_grad_enabled() or torch.compiler.is_exporting() or branch.dtype != skip.dtype
    if keeps or not overwrite:
        return branch + skip
    return branch.add_(skip)  # fresh memory costs a CPU more than the addition
