"""The discriminator in training: its network, optimizer, losses and regularizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentae.losses.adversarial import (
    LeCam,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    twice_differentiable,
)
from latentae.losses.reconstruction import wide
from latentae.training.launch import mean_over_processes
from latentae.training.optim import adamw, learning_rate_scale, set_learning_rate
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Adversary", "reduction"]


def reduction(accelerator: Accelerator, model: nn.Module, synchronize: bool) -> AbstractContextManager[None]:
    """Whether DDP averages gradients over processes in a backward pass.

    Only the last part's does.
    """
    return nullcontext() if synchronize else accelerator.no_sync(model)


class Adversary:
    """The discriminator; it is trained only through the module that `accelerator.prepare` returned.

    Args:
        recipe: of the phase.
        accelerator: of the run.
        network: the bare discriminator.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator, network: nn.Module) -> None:
        o = recipe.optimizer
        self.recipe, self.accelerator, self.options = recipe, accelerator, recipe.loss.adversarial
        self.raw: Any = network.to(accelerator.device)
        if recipe.compile:
            self.raw.compile()
        self.parameters = [p for p in self.raw.parameters() if p.requires_grad]
        self.lr = o.discriminator_lr or o.lr
        optimizer = adamw(self.parameters, self.lr, o.discriminator_betas)
        self.network, self.optimizer = accelerator.prepare(self.raw, optimizer)
        self.lecam = LeCam(self.options.lecam_decay).to(accelerator.device) if self.options.lecam else None
        self._logits: list[Tensor] = []

    def plays(self, phase_images: int) -> bool:
        """Whether it takes part after `phase_images` images of the phase."""
        return phase_images >= self.options.start_images

    def set_learning_rate(self, phase_images: int) -> None:
        """Set the rate of the next step; the warm-up starts with the discriminator."""
        scale = learning_rate_scale(
            self.recipe.optimizer, phase_images, self.recipe.images, self.options.start_images
        )
        set_learning_rate(self.optimizer, self.lr * scale)

    def generator_loss(self, reconstruction: Tensor) -> Tensor:
        """The generator's loss on a leaf [B, C, H, W], with a graph to the leaf only."""
        with self._frozen():
            return generator_loss(self.options.loss, [wide(x) for x in self.raw(reconstruction)]).mean()

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.requires_grad_(True)

    def backward(
        self, real: Tensor, fake: Tensor, parts: int, synchronize: bool, step: int
    ) -> dict[str, Tensor]:
        """Accumulate the discriminator's gradient for one of `parts` parts.

        Returns its terms for the log.

        Real and fake images share one forward pass. R1 and R2 are added every `penalty_every`
        steps, multiplied by that number (Karras et al. 2020, section 3.1).
        """
        o = self.options
        penalize = bool(o.r1 or o.r2) and step % o.penalty_every == 0
        images = torch.cat([real, fake]).requires_grad_(penalize)
        plain_attention = twice_differentiable() if penalize else nullcontext()
        with reduction(self.accelerator, self.network, synchronize), plain_attention:
            maps = [wide(x) for x in self.network(images)]
            on_real, on_fake = [x.chunk(2)[0] for x in maps], [x.chunk(2)[1] for x in maps]
            total = discriminator_loss(o.loss, on_real, on_fake).mean()
            terms = {"loss/discriminator": total, **_health(on_real, on_fake)}
            if penalize:
                r1, r2 = (half.mean() for half in gradient_penalty(maps, images).chunk(2))
                total = total + o.penalty_every * 0.5 * (o.r1 * r1 + o.r2 * r2)
                terms |= {"loss/r1": r1, "loss/r2": r2}
            if self.lecam is not None:
                terms["loss/lecam"] = self.lecam(on_real, on_fake).mean()
                total = total + o.lecam * terms["loss/lecam"]
            (total / parts).backward()
        logits = [terms["discriminator/logits_real"], terms["discriminator/logits_fake"]]
        self._logits.append(torch.stack(logits))
        return {name: value.detach() for name, value in terms.items()}

    def finish_step(self, apply: bool) -> None:
        """Step the optimizer and update LeCAM's averages, unless the step is skipped."""
        logits, self._logits = self._logits, []
        if apply:
            self.optimizer.step()
            if self.lecam is not None:
                means = mean_over_processes(self.accelerator, torch.stack(logits).mean(dim=0))
                self.lecam.update(*means.unbind())
        self.optimizer.zero_grad(set_to_none=True)


def _health(real: Sequence[Tensor], fake: Sequence[Tensor]) -> dict[str, Tensor]:
    """Mean logits, and the share of patches classified correctly; each a mean over the maps."""

    measures = {
        "logits_real": [x.mean() for x in real],
        "logits_fake": [x.mean() for x in fake],
        "accuracy_real": [(x > 0).float().mean() for x in real],
        "accuracy_fake": [(x < 0).float().mean() for x in fake],
    }
    return {f"discriminator/{name}": torch.stack(maps).mean().detach() for name, maps in measures.items()}
