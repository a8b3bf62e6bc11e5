"""Fused normalization and activation kernels, each beside its plain-torch reference.

The package depends on torch alone (and on Triton where a kernel runs), uses relative imports inside, and knows nothing of latentae.
"""

from __future__ import annotations

from .norm_act import BackendError, norm_act

__all__ = ["BackendError", "norm_act"]
