"""Fused normalization, activation and convolution steps for training and inference of convolutional
autoencoders.

The package needs only torch, and Triton where a kernel runs. It uses relative imports and does not
import latentae.
"""

from __future__ import annotations

from .dispatch import Backend, BackendError, resolve_backend, use_backend
from .lpips_head import lpips_head
from .norm_act import Norm, norm_act
from .norm_act.conv import norm_act_conv2d
from .norm_act.group_norm import channel_moments, group_moments, group_norm
from .row_norm_act import row_norm_act
from .upsample import upsample_conv2d
from .winograd import conv3x3

__all__ = [
    "Backend",
    "BackendError",
    "Norm",
    "channel_moments",
    "conv3x3",
    "group_moments",
    "group_norm",
    "lpips_head",
    "norm_act",
    "norm_act_conv2d",
    "resolve_backend",
    "row_norm_act",
    "upsample_conv2d",
    "use_backend",
]
