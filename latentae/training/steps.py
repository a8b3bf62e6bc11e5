"""One optimizer step of the autoencoder and, once it plays, of the discriminator.

The adversarial and image losses are differentiated down to the reconstruction only (a leaf), and their gradient is then sent
through the autoencoder in a single backward pass. The discriminator's parameters get no gradient from the autoencoder's loss, and no
graph is kept. An adaptive weight compares gradients at the decoder's last layer, from that layer's own input; an alignment of the
latent stops the backward pass at the latent for the same comparison at the encoder's last layer, and goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentae.data.transforms import to_float
from latentae.losses.adversarial import twice_differentiable
from latentae.losses.objective import LossTerms, Objective
from latentae.models.base import AutoencoderOutput
from latentae.models.last_layer import decoder_weight_gradient, encoder_weight_gradient
from latentae.training.adversary import Adversary, reduction, wide
from latentae.training.corruption import Corruption
from latentae.training.draws import Draws, keyed_normal
from latentae.training.ema import Ema
from latentae.training.launch import agree
from latentae.training.networks import build_autoencoder, build_discriminator
from latentae.training.optim import autoencoder_optimizers, learning_rate_scale, set_learning_rate
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainState", "Trainer"]

RATIO_EPS = 1e-4  # VQGAN (Esser et al. 2021), eq. 7, as LDM's code has it


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        step: steps of the run, the skipped ones too.
        images_seen: images of the run.
        phase: index of the recipe's phase, from 0.
        phase_images: images of this phase.
        skipped: steps left out because a loss or gradient was not finite.
        skipped_in_a_row: how many of them were the last ones.
        rollbacks: returns to an earlier checkpoint.
    """

    step: int = 0
    images_seen: int = 0
    phase: int = 0
    phase_images: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class Part:
    """One accumulation step: its images [b, C, H, W] in [-1, 1], its number of how many, and what is asked of it."""

    images: Tensor
    index: int = 0
    count: int = 1
    adversarial: bool = False
    report: bool = False

    @property
    def last(self) -> bool:
        """Whether gradients are reduced over processes in its backward pass."""
        return self.index == self.count - 1


class Trainer:
    """The networks of one phase, their optimizers and their average, and the step that moves them.

    Trainable networks are called only through what `accelerator.prepare` returned, so that gradients are reduced; parameters that belong
    to a loss are reduced here.
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
        # by the losses and corruptions, which no DDP wraps
        self.owned = [
            p for part in (self.objective, self.corruption) for p in part.parameters() if p.requires_grad
        ]
        optimizers = autoencoder_optimizers(self.raw_autoencoder, self.owned, recipe.optimizer)
        self.peak_lr = {name: optimizer.param_groups[0]["lr"] for name, optimizer in optimizers.items()}
        self.autoencoder, *prepared = accelerator.prepare(self.raw_autoencoder, *optimizers.values())
        self.autoencoder_optimizers = dict(zip(optimizers, prepared, strict=True))
        network = build_discriminator(recipe)
        self.adversary = None if network is None else Adversary(recipe, accelerator, network)
        self.state = TrainState()

    @property
    def raw_discriminator(self) -> nn.Module | None:
        """The bare discriminator, if there is one."""
        return None if self.adversary is None else self.adversary.raw

    @property
    def saved(self) -> dict[str, Any]:
        """Everything with a state that a checkpoint keeps, by name, but for the optimizers."""
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
        """Whether the phase's images have been seen."""
        return self.state.phase_images >= self.recipe.images

    @property
    def adversarial(self) -> bool:
        """Whether the discriminator plays at this step."""
        return self.adversary is not None and self.adversary.plays(self.state.phase_images)

    def update(self, parts: Sequence[Tensor], report: bool = False) -> dict[str, Tensor]:
        """One step of all networks on this process's share of a global batch.

        A step whose loss or gradient is not finite on any process is left out on all; the state counts it.

        Args:
            parts: uint8 images [b, C, H, W] per accumulation step, equal in size on all processes.
            report: also measure each term's gradient norm, at the reconstruction or the latent it is computed from.

        Returns:
            Means over this process's share of every term, unweighted, and gradient norms; detached scalars.
        """
        adversary = self.adversary if self.adversarial else None
        self._set_learning_rates()
        sums: dict[str, Tensor] = {}
        for index, part in enumerate(parts):
            images = to_float(part.to(self.accelerator.device, non_blocking=True))
            part = Part(images, index, len(parts), adversary is not None, report)
            scalars, real, fake = self._autoencoder_backward(part)
            if adversary is not None:
                scalars |= adversary.backward(real, fake, part.count, part.last, self.state.step)
            for name, value in scalars.items():
                sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value / len(parts)
        self._reduce_owned()
        norms = {"autoencoder": self._clip([*self.trained, *self.owned])}
        if adversary is not None:
            norms["discriminator"] = self._clip(adversary.parameters)
        (bad,) = agree(
            self.accelerator,
            not torch.isfinite(torch.stack([sums["loss/total"], *norms.values()])).all().item(),
        )
        self._finish_step(adversary, apply=not bad)
        return sums | {f"gradient_norm/{name}": norm for name, norm in norms.items()}

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

    def _autoencoder_backward(self, part: Part) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Accumulate the autoencoder's gradient for one part; returns its terms, and what the discriminator compares: real and fake."""
        images, objective, draws = part.images, self.objective, self._draws(part)
        adaptive = part.adversarial and self.recipe.loss.adversarial.adaptive
        aligned = objective.alignment is not None
        noise = self._noise(part)
        given = self.corruption.images(images, draws, self.state.phase_images)
        path = self.corruption.latent_path(self._latent_shape(part)[1:], draws)
        contractive = objective.options.contractive.weight > 0
        seen = (
            given.images.detach().requires_grad_()
            if contractive and not given.images.requires_grad
            else given.images
        )
        with reduction(self.accelerator, self.autoencoder, part.last):
            with twice_differentiable() if contractive else nullcontext():
                output = self.autoencoder(
                    seen,
                    noise=noise,
                    sample_posterior=self.recipe.model.bottleneck == "gaussian",
                    latent_transform=path.latent,
                    also_decode=path.smaller,
                    cut_latent=aligned,
                    keep_features=adaptive or aligned,
                )
            target = images if path.target is None else path.target(images)
            leaf = wide(output.reconstruction.detach()).requires_grad_()
            with self.accelerator.autocast():
                image = objective.image_terms(leaf, target, given.hidden)
                latent = objective.latent_terms(output, images, reduce=self._mean_over_processes)
                if contractive:
                    latent = latent.merged(
                        objective.contractive_terms(output, seen, self._probes(part, draws))
                    )
            scalars = {f"loss/{name}": value for name, value in (image.scalars | latent.scalars).items()}
            if part.report:
                scalars |= _norms(image, [leaf]) | _norms(
                    latent, [output.posterior.mean, output.posterior.logvar]
                )
            gradient, total = self._image_gradient(part, output, leaf, image, scalars)
            roots, gradients = (
                [output.reconstruction],
                [gradient.to(output.reconstruction.dtype) / part.count],
            )
            if output.also is not None and path.smaller_target is not None:
                gradient, value = self._smaller_gradient(
                    part, output.also, path.smaller_target(images), scalars
                )
                total = total + value
                roots.append(output.also)
                gradients.append(gradient)
            if aligned:
                torch.autograd.backward(roots, gradients)
                value, at_latent = self._align(part, output, noise, scalars)
                total = total + value
                roots, gradients = [output.latent], [at_latent]
            if latent.total.requires_grad:  # not where the encoder is frozen
                roots.append(latent.total)
                gradients.append(torch.full_like(latent.total, 1 / part.count))
            torch.autograd.backward(roots, gradients)
        scalars["loss/total"] = (total + latent.total).detach()
        return scalars, target, leaf.detach()

    def _smaller_gradient(
        self, part: Part, smaller: Tensor, target: Tensor, scalars: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradient at the decoded smaller latent, of the image losses against the smaller image, and their weighted sum."""
        weight = self.recipe.loss.equivariance.downscaled
        leaf = wide(smaller.detach()).requires_grad_()
        with self.accelerator.autocast():
            terms = self.objective.image_terms(leaf, target)
        gradient, *owned = torch.autograd.grad(terms.total, [leaf, *self.owned], allow_unused=True)
        _accumulate(self.owned, owned, weight / part.count)
        scalars["loss/downscaled"] = terms.total.detach()
        return (weight / part.count * gradient).to(smaller.dtype), weight * terms.total.detach()

    def _image_gradient(
        self,
        part: Part,
        output: AutoencoderOutput,
        leaf: Tensor,
        image: LossTerms,
        scalars: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Gradient of all losses on the image at the reconstruction, and their weighted sum; adds to `scalars`."""
        gradient, *owned = torch.autograd.grad(image.total, [leaf, *self.owned], allow_unused=True)
        _accumulate(self.owned, owned, 1 / part.count)
        if not part.adversarial or self.adversary is None:
            return gradient, image.total.detach()
        options = self.recipe.loss.adversarial
        with self.accelerator.autocast():
            loss = self.adversary.generator_loss(leaf)
        (adversarial,) = torch.autograd.grad(loss, leaf)
        weight = torch.full((), options.weight, device=leaf.device, dtype=leaf.dtype)
        if options.adaptive:
            assert output.decoder_features is not None
            both = torch.cat([gradient, adversarial], dim=1)
            pair = decoder_weight_gradient(self.raw_autoencoder, output.decoder_features, both).chunk(2)
            ratio = self._ratio(pair, options.max_ratio)
            weight = weight * ratio
            scalars["adversarial/ratio"] = ratio
        scalars["loss/adversarial"] = loss.detach()
        if part.report:
            scalars["gradient_norm/adversarial"] = weight * torch.linalg.vector_norm(adversarial)
        return gradient + weight * adversarial, (image.total + weight * loss).detach()

    def _align(
        self, part: Part, output: AutoencoderOutput, noise: Tensor, scalars: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Add the alignment's gradient at the latent to what came back through the decoder; returns its weighted value too."""
        options = self.recipe.loss.alignment
        leaf = wide(output.latent.detach()).requires_grad_()
        with self.accelerator.autocast():
            terms = self.objective.alignment_terms(leaf, part.images)
        gradient, *owned = torch.autograd.grad(terms.total, [leaf, *self.owned], allow_unused=True)
        assert output.leaf is not None
        assert output.leaf.grad is not None
        through_decoder = output.leaf.grad
        weight = torch.full((), options.weight, device=leaf.device, dtype=leaf.dtype)
        if options.adaptive:
            assert output.encoder_features is not None
            features = output.encoder_features
            # gradients of the part's own mean, so that the ratio does not depend on the number of parts
            sampled = noise if self.recipe.model.bottleneck == "gaussian" else None
            pair = [
                encoder_weight_gradient(self.raw_autoencoder, features, sampled, g)
                for g in (through_decoder * part.count, gradient)
            ]
            ratio = self._ratio(pair, float("inf"))
            weight = weight * ratio
            scalars["alignment/ratio"] = ratio
        _accumulate(self.owned, owned, weight / part.count)
        scalars |= {f"loss/{name}": value for name, value in terms.scalars.items()}
        if part.report:
            scalars["gradient_norm/alignment"] = weight * torch.linalg.vector_norm(gradient)
            scalars["gradient_norm/through_decoder"] = torch.linalg.vector_norm(through_decoder) * part.count
        at_latent = through_decoder + (weight / part.count * gradient).to(through_decoder.dtype)
        return (weight * terms.total).detach(), at_latent

    def _ratio(self, gradients: Sequence[Tensor], limit: float) -> Tensor:
        """|first| / (|second| + eps), clamped; the gradients [2 x weight] are those of the whole batch of all processes."""
        pair = torch.stack(list(gradients))
        if self.accelerator.num_processes > 1:
            pair = self.accelerator.reduce(pair, "mean")
        reference, other = pair.flatten(1).norm(dim=1)  # pyright: ignore
        return (reference / (other + RATIO_EPS)).clamp(0.0, limit).detach()

    def _noise(self, part: Part) -> Tensor:
        """Posterior noise keyed by position in the global batch, so that any split of a batch sees the same numbers."""
        return keyed_normal(
            self._latent_shape(part), self.recipe.seed, self.state.step, self._first(part)
        ).to(part.images.device)

    def _draws(self, part: Part) -> Draws:
        return Draws(
            self.recipe.seed, self.state.step, self._first(part), len(part.images), part.images.device
        )

    def _probes(self, part: Part, draws: Draws) -> Tensor:
        """Standard normal [k, B, z, h, w], for the contractive term."""
        shape = (self.recipe.loss.contractive.probes, *self._latent_shape(part)[1:])
        return draws.normal(shape, "contractive").transpose(0, 1)

    def _mean_over_processes(self, value: Tensor) -> Tensor:
        return value if self.accelerator.num_processes == 1 else self.accelerator.reduce(value, "mean")  # pyright: ignore

    def _first(self, part: Part) -> int:
        """Position of the part's first sample in the global batch; a process owns consecutive samples of it."""
        return (self.accelerator.process_index * part.count + part.index) * len(part.images)

    def _latent_shape(self, part: Part) -> tuple[int, int, int, int]:
        config, (size, _, height, width) = self.raw_autoencoder.config, part.images.shape
        return size, config.latent_channels, height // config.downsampling, width // config.downsampling

    def _set_learning_rates(self) -> None:
        seen = self.state.phase_images
        scale = learning_rate_scale(self.recipe.optimizer, seen, self.recipe.images)
        for name, optimizer in self.autoencoder_optimizers.items():
            set_learning_rate(optimizer, self.peak_lr[name] * scale)
        if self.adversary is not None:
            self.adversary.set_learning_rate(seen)

    def _reduce_owned(self) -> None:
        """Average the gradients of the losses' own parameters, which no DDP wraps, over processes."""
        if self.accelerator.num_processes == 1 or not self.owned:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.owned]
        reduced = self.accelerator.reduce(gradients, "mean")
        for parameter, gradient in zip(self.owned, reduced, strict=True):  # pyright: ignore
            parameter.grad = gradient

    def _clip(self, parameters: Iterable[Tensor]) -> Tensor:
        limit = self.recipe.optimizer.max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(parameters, limit).detach()


def _accumulate(
    parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], scale: float | Tensor
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient * scale if parameter.grad is None else parameter.grad + gradient * scale


def _norms(terms: LossTerms, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Norm of every weighted term's gradient at `inputs`, for the log; the graph stays for the step itself."""
    inputs = [x for x in inputs if x.requires_grad]
    norms = {}
    for name, term in terms.weighted.items():
        if inputs and term.requires_grad:
            gradients = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
            parts = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
            if parts:
                norms[f"gradient_norm/{name}"] = torch.stack(parts).norm()
    return norms
