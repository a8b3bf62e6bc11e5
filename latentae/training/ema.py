"""A moving average of weights, kept in fp32."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Ema"]


class Ema:
    """Exponential moving average of a module's parameters, its memory counted in images.

    The half-life grows with the run until it reaches its final value (Karras et al. 2023, "EDM2", ramp-up), so that early
    averages do not remember the random start.

    Args:
        module: the module to follow.
        half_life_images: images after which a weight's share has halved; 0 keeps the latest weights.
    """

    RAMP_UP = 0.05

    def __init__(self, module: nn.Module, half_life_images: int) -> None:
        self.half_life_images = half_life_images
        self.weights = {
            name: p.detach().to(torch.float32, copy=True) for name, p in module.named_parameters()
        }
        # what a state dict has beside: stored statistics of frozen normalizations, which stay as they are
        self.fixed = {
            name: value.detach() for name, value in module.state_dict().items() if name not in self.weights
        }

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Share of the old average kept at this step."""
        half_life = min(self.half_life_images, images_seen * self.RAMP_UP)
        return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0

    @torch.no_grad()
    def update(self, module: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the average towards the module's weights after an optimizer step."""
        latest = [p.detach().float() for p in module.parameters()]
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.weights.values()), latest, 1 - self.decay(images_seen, batch_size)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name, and what else the module's state dict has."""
        return {**self.weights, **self.fixed}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore averaged weights, copied to where the average lies.

        Raises:
            ValueError: a name or a shape differs.
        """
        for name in (self.weights | self.fixed).keys() ^ state.keys():
            raise ValueError(f"the average {'has unknown' if name in state else 'lacks'} {name}")
        for name, value in (self.weights | self.fixed).items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"the average of {name} has shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
                )
            value.copy_(state[name])
