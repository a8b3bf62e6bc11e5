"""The regularizers of a latent: one line each.

`REGULARIZERS["name"]` is the module beside this one that has a function of the same name, `(output: AutoencoderOutput, images [B, C, H, W] in
[-1, 1]) -> [B]`, and what its weight does, in one sentence. The line makes the weight an option of every recipe, `loss.NAME`, with a
line of the log and of the list of effective weights. docs/add_a_loss.md goes through it.
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
