"""The training step: networks of one phase, their optimizers, and one update of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentae.data.transforms import to_float
from latentae.errors import ModelError, RecipeError
from latentae.losses.objective import Objective
from latentae.losses.options import AdversarialOptions
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.backbone import FrozenBackbone
from latentae.models.base import Autoencoder
from latentae.models.config import build
from latentae.models.dc.autoencoder import AutoencoderDC
from latentae.models.discriminator import FeatureDiscriminator, PatchDiscriminator, UNetDiscriminator
from latentae.models.initialization import (
    load_discriminator,
    load_initial,
    set_deterministic,
    set_initial_logvar,
    start_linear,
)
from latentae.progress import note
from latentae.training.adversary import Adversary
from latentae.training.autoencoder_loss import AutoencoderLoss, Part
from latentae.training.corruption import Corruption, Draws
from latentae.training.launch import agree, mean_over_processes
from latentae.training.optim import Ema, autoencoder_optimizers, learning_rate_scale, set_learning_rate
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainState", "Trainer", "build_autoencoder", "build_discriminator"]


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: steps so far, skipped ones included.
        images_seen: images so far.
        phase: index of the recipe's phase, from 0.
        phase_images: images of this phase so far.
        skipped: steps skipped because a loss or gradient was not finite.
        skipped_in_a_row: the latest of them in a row.
        rollbacks: returns to an earlier checkpoint.
    """

    step: int = 0
    images_seen: int = 0
    phase: int = 0
    phase_images: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0


class Trainer:
    """The networks of one phase, their optimizers and average, and the step that updates them.

    Trainable networks are called only through the modules that `accelerator.prepare` returned,
    which reduce gradients over processes. The trainer reduces the gradients of parameters that
    belong to losses.
    """

    def __init__(self, recipe: Recipe, accelerator: Accelerator) -> None:
        self.recipe, self.accelerator = recipe, accelerator
        device = accelerator.device
        self.raw_autoencoder = build_autoencoder(recipe).to(device)
        latent_channels = self.raw_autoencoder.config.latent_channels
        self.objective = Objective(recipe.loss, latent_channels).to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.ema = Ema(self.raw_autoencoder, recipe.ema.half_life_images)
        if recipe.compile:
            self.raw_autoencoder.compile_coders()
        self.trained = [p for p in self.raw_autoencoder.parameters() if p.requires_grad]
        self.corruption = Corruption(recipe, self.raw_autoencoder.config).to(device)
        # parameters of losses and corruptions, which no DDP wraps
        own = (self.objective, self.corruption)
        self.owned = [p for module in own for p in module.parameters() if p.requires_grad]
        optimizers = autoencoder_optimizers(self.raw_autoencoder, self.owned, recipe.optimizer)
        self.peak_lr = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        self.autoencoder, *prepared = accelerator.prepare(self.raw_autoencoder, *optimizers.values())
        self.autoencoder_optimizers = dict(zip(optimizers, prepared, strict=True))
        network = build_discriminator(recipe)
        self.adversary = None if network is None else Adversary(recipe, accelerator, network)
        self.loss = AutoencoderLoss(
            recipe,
            accelerator,
            self.raw_autoencoder,
            self.autoencoder,
            self.objective,
            self.corruption,
            self.owned,
            self.adversary,
        )
        self.state = TrainState()

    @property
    def raw_discriminator(self) -> nn.Module | None:
        """The bare discriminator, if there is one."""
        return None if self.adversary is None else self.adversary.raw

    @property
    def saved(self) -> dict[str, Any]:
        """The parts that a checkpoint saves, by name, without the optimizers."""
        parts = {
            "autoencoder": self.raw_autoencoder,
            "ema": self.ema,
            "objective": self.objective,
            "corruption": self.corruption,
        }
        if self.adversary is not None:
            parts["discriminator"] = self.adversary.raw
            if self.adversary.lecam is not None:
                parts["lecam"] = self.adversary.lecam
        return parts

    @property
    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers by name."""
        found = self.autoencoder_optimizers
        return found if self.adversary is None else {**found, "discriminator": self.adversary.optimizer}

    @property
    def finished(self) -> bool:
        """Whether all images of the phase have been seen."""
        return self.state.phase_images >= self.recipe.images

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator takes part in this step."""
        return self.adversary is not None and self.adversary.plays(self.state.phase_images)

    def check_resolution(self) -> None:
        """Check that model, discriminator and losses accept images of the recipe's resolution.

        Raises:
            RecipeError: the resolution is not a multiple of the downsampling, or too small.
        """
        resolution, f = self.recipe.data.resolution, self.raw_autoencoder.config.downsampling
        if resolution % f:
            found = f"data.resolution {resolution} is not a multiple of the model's downsampling {f}"
            raise RecipeError(f"{found}; use {resolution // f * f or f}")
        equivariance, shrunk = self.recipe.loss.equivariance, 1.0
        if equivariance.probability:
            shrunk = equivariance.smallest_scale
        if equivariance.downscaled:
            shrunk = min(shrunk, 1.0 / max(equivariance.factors))
        smallest = max(round(shrunk * resolution / f), 1) * f
        needed = {"the feature network of a loss": self.objective.minimum_size}
        if self.adversary is not None:
            needed["the discriminator"] = self.adversary.raw.minimum_size
        for name, size in needed.items():
            if smallest < size:
                scaled = f", shrunk to {smallest} by loss.equivariance," if shrunk < 1 else ""
                raise RecipeError(
                    f"data.resolution {resolution}{scaled} is below the {size} pixels that {name} needs"
                )

    def update(self, parts: Sequence[Tensor], report: bool = False) -> dict[str, Tensor]:
        """Take one step of all networks on this process's share of a global batch.

        If a loss or gradient is not finite on any process, all processes skip the step; the state
        counts it.

        Args:
            parts: uint8 images [b, C, H, W] per accumulation step, equal in size on all processes.
            report: also measure each term's gradient norm at the reconstruction or latent that it
                is computed from.

        Returns:
            Means over this process's share of every unweighted term, and gradient norms; detached
            scalars.
        """
        adversary = self.adversary if self.adversarial else None
        self._set_learning_rates()
        found = []
        for index, images in enumerate(parts):
            part = self._part(images, index, len(parts), report)
            terms, real, fake = self.loss.backward(part)
            if adversary is not None:
                terms |= adversary.backward(real, fake, part.count, part.last, self.state.step)
            found.append(terms)
        means = {name: reduce(torch.add, [terms[name] for terms in found]) / len(found) for name in found[0]}
        self._reduce_owned()
        norms = {"autoencoder": self._clip([*self.trained, *self.owned])}
        if adversary is not None:
            norms["discriminator"] = self._clip(adversary.parameters)
        finite = torch.isfinite(torch.stack([means["loss/total"], *norms.values()])).all().item()
        (bad,) = agree(self.accelerator, not finite)
        self._finish_step(adversary, apply=not bad)
        return means | {f"gradient_norm/{name}": norm for name, norm in norms.items()}

    def _part(self, images: Tensor, index: int, count: int, report: bool) -> Part:
        """An accumulation step.

        Numbers are keyed by position in the global batch, of which a process owns consecutive
        samples.
        """
        device, size = self.accelerator.device, len(images)
        first = (self.accelerator.process_index * count + index) * size
        return Part(
            to_float(images.to(device, non_blocking=True)),
            Draws(self.recipe.seed, self.state.step, first, size, device),
            self.state.phase_images,
            count,
            last=index == count - 1,
            adversarial=self.adversarial,
            report=report,
        )

    def _set_learning_rates(self) -> None:
        seen = self.state.phase_images
        scale = learning_rate_scale(self.recipe.optimizer, seen, self.recipe.images)
        for name, optimizer in self.autoencoder_optimizers.items():
            set_learning_rate(optimizer, self.peak_lr[name] * scale)
        if self.adversary is not None:
            self.adversary.set_learning_rate(seen)

    def _reduce_owned(self) -> None:
        if self.accelerator.num_processes == 1 or not self.owned:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.owned]
        means = mean_over_processes(self.accelerator, gradients)
        for parameter, gradient in zip(self.owned, means, strict=True):
            parameter.grad = gradient

    def _clip(self, parameters: Iterable[Tensor]) -> Tensor:
        limit = self.recipe.optimizer.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(parameters, limit).detach()

    def _finish_step(self, adversary: Adversary | None, apply: bool) -> None:
        for optimizer in self.autoencoder_optimizers.values():
            if apply:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if adversary is not None:
            adversary.finish_step(apply)
        state, size = self.state, self.recipe.batch_size
        state.step += 1
        state.images_seen += size
        state.phase_images += size
        state.skipped += not apply
        state.skipped_in_a_row = 0 if apply else state.skipped_in_a_row + 1
        if apply:
            self.ema.update(self.raw_autoencoder, state.images_seen, size)


def build_autoencoder(recipe: Recipe) -> Autoencoder:
    """The recipe's autoencoder, initialized from its seed or from `model.init_from`.

    Parts that are not trained are frozen.

    Raises:
        ModelError: `model.init_from` can't be read or has another shape.
    """
    torch.manual_seed(recipe.seed)
    model = build(recipe.autoencoder_config())
    if recipe.model.init_from is not None:
        _load(model, recipe.model.init_from, recipe.model.initial_logvar)
    elif isinstance(model, AutoencoderKL | AutoencoderDC):
        if recipe.model.initialization == "linear":  # "pca" needs images, see training/init.py
            start_linear(model)
        set_initial_logvar(model, recipe.model.initial_logvar)
    if recipe.model.bottleneck == "deterministic":
        set_deterministic(model)
    model.select_trainable(recipe.model.train)
    model.gradient_checkpointing = recipe.model.gradient_checkpointing
    return model


def _load(model: Autoencoder, path: str, logvar: float) -> None:
    """Copy weights; a posterior that they lack begins at `logvar`."""
    state, expected = load_initial(path).state, model.state_dict()
    if isinstance(model, AutoencoderDC):
        set_initial_logvar(model, logvar)
        state = model.with_own_head(state)
    for key in {**expected, **state}:
        found, wanted = (f"{tuple(s[key].shape)}" if key in s else "missing" for s in (state, expected))
        if found != wanted:
            raise ModelError(
                f"{path} does not fit the recipe's model: {key} is {found} there and {wanted} in the recipe; "
                "--model.preset init takes the shape of the file"
            )
    model.load_state_dict(state)


def build_discriminator(recipe: Recipe) -> nn.Module | None:
    """The recipe's discriminator, or None without an adversarial term.

    Raises:
        ModelError: `model.init_discriminator` is "yes", but `model.init_from` has none that fits.
        WeightsError, MissingDependencyError: the weights of its frozen backbone are missing.
    """
    options = recipe.loss.adversarial
    if not options.weight:
        return None
    torch.manual_seed(recipe.seed + 1)
    model = _discriminator(options, recipe.autoencoder_config().out_channels)
    if recipe.model.init_from is not None and recipe.model.init_discriminator != "no":
        state = load_initial(recipe.model.init_from).discriminator
        problem = "it has no discriminator" if state is None else load_discriminator(model, state)
        if problem and recipe.model.init_discriminator == "yes":
            advice = "--model.init-discriminator no starts a new one"
            raise ModelError(f"{recipe.model.init_from}: {problem}; {advice}")
        if problem and state is not None:
            note(f"{recipe.model.init_from}: ignoring its discriminator and starting a new one: {problem}")
    return model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _discriminator(options: AdversarialOptions, channels: int) -> nn.Module:
    if options.discriminator == "features":
        backbone = FrozenBackbone(options.backbone, options.backbone_weights)
        return FeatureDiscriminator(backbone, options.channels, options.norm)
    network = UNetDiscriminator if options.discriminator == "unet" else PatchDiscriminator
    return network(channels, options.channels, options.layers, options.norm)
