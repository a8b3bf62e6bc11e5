"""The table of latent regularizers, one line each.

A line has a module's name in this package and one sentence on its weight. The module has a function
of the same name, `(output: AutoencoderOutput, images [B, C, H, W] in [-1, 1]) -> [B]`. The line
adds the option `loss.NAME` to every recipe, a curve to the log and an entry to the weights that a
run prints. docs/add_a_loss.md walks through an example.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from latentae.models.base import AutoencoderOutput

__all__ = ["REGULARIZERS", "regularizer"]

# Names instead of functions, so that reading a recipe does not load torch.
REGULARIZERS: dict[str, str] = {
    "spectrum": "Weight of the divergence between the spectra of the latent and of the small image.",
}


def regularizer(name: str) -> Callable[[AutoencoderOutput, Tensor], Tensor]:
    """The function of a line of `REGULARIZERS`."""
    return getattr(import_module(f"latentae.losses.{name}"), name)
