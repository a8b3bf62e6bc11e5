"""The regularizers of a latent: one line each.

A line has the name of a module beside this one with a function of the same name, and what its weight does, in one sentence. The function
is `(output: AutoencoderOutput, images [B, C, H, W] in [-1, 1]) -> [B]`. The line makes its weight an option of every recipe, `loss.NAME`,
a curve of the log and one of the effective weights that a run prints. docs/add_a_loss.md goes through it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from latentae.models.base import AutoencoderOutput

    Regularizer = Callable[[AutoencoderOutput, Tensor], Tensor]

__all__ = ["REGULARIZERS", "regularizer"]

# Names, not functions: reading a recipe does not load torch.
REGULARIZERS: dict[str, str] = {
    "spectrum": "Weight of the divergence between the spectra of the latent and of the small image.",
}


def regularizer(name: str) -> Regularizer:
    """The function of a line of `REGULARIZERS`."""
    return getattr(import_module(f"latentae.losses.{name}"), name)
