"""Fused normalization and activation kernels, each beside its plain-torch reference.

The package depends on torch alone (and on Triton where a kernel runs), uses relative imports inside, and knows nothing of latentae.
"""

from __future__ import annotations

from .dispatch import Backend, BackendError, resolve_backend, use_backend
from .group_norm import channel_moments, group_moments, group_norm
from .lpips_head import lpips_head
from .norm_act import norm_act
from .norm_act_conv import norm_act_conv2d
from .row_norm_act import row_norm_act
from .upsample import upsample_conv2d
from .winograd import Norm, conv3x3

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
