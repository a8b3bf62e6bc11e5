"""One optimizer step of the autoencoder and, once it plays, of the discriminator.

The adversarial and image losses are differentiated down to the reconstruction only (a leaf), and their gradient is then sent
through the autoencoder in a single backward pass. The discriminator's parameters get no gradient from the autoencoder's loss,
nothing needs freezing, and no graph is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentae.data.transforms import to_float
from latentae.losses.adversarial import hinge_discriminator, hinge_generator
from latentae.losses.objective import Objective
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.discriminator import PatchDiscriminator
from latentae.models.initialization import set_initial_logvar, start_linear
from latentae.training.ema import Ema
from latentae.training.keyed import keyed_normal
from latentae.training.optim import build_optimizer, learning_rate_scale, set_learning_rate
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainState", "Trainer", "build_autoencoder", "build_discriminator"]


@dataclass
class TrainState:
    """How far a run is."""

    step: int = 0
    images_seen: int = 0


def build_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """The recipe's autoencoder with the weights its seed gives."""
    torch.manual_seed(recipe.seed)
    model = AutoencoderKL(recipe.autoencoder_config())
    if recipe.model.initialization == "linear":
        start_linear(model)
    set_initial_logvar(model, recipe.model.initial_logvar)
    return model


def build_discriminator(recipe: Recipe) -> PatchDiscriminator | None:
    """The recipe's discriminator, or None where no adversarial term is asked for."""
    options = recipe.loss.adversarial
    if not options.weight:
        return None
    torch.manual_seed(recipe.seed + 1)
    channels = recipe.autoencoder_config().out_channels
    model = PatchDiscriminator(channels, options.channels, options.layers, options.norm)
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


class Trainer:
    """The networks of a run, their optimizers and their average, and the step that moves them.

    Trainable networks are called only through what `accelerator.prepare` returned, so that gradients are reduced.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        o = recipe.optimizer
        self.objective = Objective(recipe.loss).to(accelerator.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.raw_autoencoder = build_autoencoder(recipe).to(accelerator.device)
        self.ema = Ema(self.raw_autoencoder, recipe.ema.half_life_images)
        optimizer = build_optimizer(self.raw_autoencoder.parameters(), o.lr, o.betas, o.weight_decay)
        self.autoencoder, self.optimizer = accelerator.prepare(self.raw_autoencoder, optimizer)
        self.raw_discriminator = build_discriminator(recipe)
        self.discriminator: nn.Module | None = None
        self.discriminator_optimizer: torch.optim.Optimizer | None = None
        if self.raw_discriminator is not None:
            self.raw_discriminator.to(accelerator.device)
            d_lr = o.discriminator_lr or o.lr
            d_optimizer = build_optimizer(self.raw_discriminator.parameters(), d_lr, o.discriminator_betas, 0.0)
            self.discriminator, self.discriminator_optimizer = accelerator.prepare(self.raw_discriminator, d_optimizer)
        self.state = TrainState()

    @property
    def finished(self) -> bool:
        """Whether the recipe's images have been seen."""
        return self.state.images_seen >= self.recipe.images

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator plays at this step."""
        return self.discriminator is not None and self.state.images_seen >= self.recipe.loss.adversarial.start_images

    def update(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """One step of all networks on this process's share of a global batch.

        Args:
            parts: uint8 images [b, C, H, W] per accumulation step, equal in size on all processes.

        Returns:
            Means over this process's share of every term, unweighted, and gradient norms; detached scalars.
        """
        self._set_learning_rates()
        adversarial = self.adversarial
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            images = to_float(part.to(self.accelerator.device, non_blocking=True))
            synchronize = index == len(parts) - 1
            scalars, fake = self._autoencoder_backward(images, index, len(parts), adversarial, synchronize)
            if adversarial:
                scalars |= self._discriminator_backward(images, fake, len(parts), synchronize)
            for name, value in scalars.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / len(parts)
        sums["gradient_norm/autoencoder"] = self._optimizer_step(self.raw_autoencoder, self.optimizer)
        if adversarial and self.raw_discriminator is not None and self.discriminator_optimizer is not None:
            sums["gradient_norm/discriminator"] = self._optimizer_step(self.raw_discriminator, self.discriminator_optimizer)
        self.state.step += 1
        self.state.images_seen += self.recipe.batch_size
        self.ema.update(self.raw_autoencoder, self.state.images_seen, self.recipe.batch_size)
        return sums

    def _autoencoder_backward(
        self, images: Tensor, index: int, count: int, adversarial: bool, synchronize: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Accumulate the autoencoder's gradient for one part; returns its terms and the detached reconstruction."""
        with self._reduction(self.autoencoder, synchronize):
            output = self.autoencoder(images, noise=self._noise(images, index, count))
            leaf = _wide(output.reconstruction.detach()).requires_grad_()
            with self.accelerator.autocast():
                image = self.objective.image_terms(leaf, images)
                latent = self.objective.latent_terms(output.posterior, images)
                generator = (
                    hinge_generator(self.raw_discriminator(leaf)).mean() if adversarial and self.raw_discriminator else None
                )
            image_loss = image.total if generator is None else image.total + self.recipe.loss.adversarial.weight * generator
            (gradient,) = torch.autograd.grad(image_loss, leaf)
            torch.autograd.backward(
                [output.reconstruction, latent.total],
                [gradient.to(output.reconstruction.dtype) / count, torch.full_like(latent.total, 1 / count)],
            )
        scalars = {f"loss/{name}": value for name, value in (image.scalars | latent.scalars).items()}
        if generator is not None:
            scalars["loss/adversarial"] = generator.detach()
        scalars["loss/total"] = (image_loss + latent.total).detach()
        return scalars, leaf.detach()

    def _discriminator_backward(self, real: Tensor, fake: Tensor, count: int, synchronize: bool) -> dict[str, Tensor]:
        """Accumulate the discriminator's gradient for one part, real and fake in one forward pass."""
        assert self.discriminator is not None
        with self._reduction(self.discriminator, synchronize):
            logits = _wide(self.discriminator(torch.cat([real, fake])))
            on_real, on_fake = logits.chunk(2)
            loss = hinge_discriminator(on_real, on_fake).mean()
            (loss / count).backward()
        return {
            "loss/discriminator": loss.detach(),
            "discriminator/logits_real": on_real.detach().mean(),
            "discriminator/logits_fake": on_fake.detach().mean(),
        }

    def _reduction(self, model: nn.Module, synchronize: bool) -> AbstractContextManager[None]:
        """DDP sums gradients over processes in the last part's backward pass only."""
        return nullcontext() if synchronize else self.accelerator.no_sync(model)

    def _noise(self, images: Tensor, index: int, count: int) -> Tensor:
        """Posterior noise keyed by position in the global batch, so that any split of a batch sees the same numbers."""
        config, size = self.raw_autoencoder.config, images.shape[0]
        f = config.downsampling
        first = (self.accelerator.process_index * count + index) * size  # a process owns consecutive samples of the batch
        shape = (size, config.latent_channels, images.shape[2] // f, images.shape[3] // f)
        return keyed_normal(shape, self.recipe.seed, self.state.step, first).to(images.device)

    def _set_learning_rates(self) -> None:
        o, seen, images = self.recipe.optimizer, self.state.images_seen, self.recipe.images
        set_learning_rate(self.optimizer, o.lr * learning_rate_scale(o, seen, images))
        if self.discriminator_optimizer is not None:
            start = self.recipe.loss.adversarial.start_images
            scale = learning_rate_scale(o, seen, images, start) if self.adversarial else 0.0
            set_learning_rate(self.discriminator_optimizer, (o.discriminator_lr or o.lr) * scale)

    def _optimizer_step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        limit = self.recipe.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm.detach()


def _wide(x: Tensor) -> Tensor:
    """Half precision to fp32; losses and their gradients are computed in at least that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
