"""The autoencoder's loss: terms that state where their gradient enters the backward pass.

The image and adversarial losses are differentiated down to the detached reconstruction only. The
sum of their gradients goes through the autoencoder in one backward pass, so no graph is retained
and the discriminator's parameters get no gradient (docs/decisions/0002-leaf-gradient.md). A term at
the latent cuts that pass once more: the decoder's part runs first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentae.losses.adversarial import twice_differentiable
from latentae.losses.objective import LossTerms, Objective
from latentae.losses.reconstruction import wide
from latentae.models.base import Autoencoder, AutoencoderOutput
from latentae.training.adversary import Adversary, reduction
from latentae.training.corruption import Corruption, Draws
from latentae.training.launch import mean_over_processes
from latentae.training.recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["AutoencoderLoss", "Part"]

RATIO_EPS = 1e-4  # VQGAN (Esser et al. 2021), eq. 7, as in LDM's code


@dataclass(frozen=True)
class Part:
    """One accumulation step of this process.

    Attributes:
        images: [b, C, H, W] in [-1, 1].
        draws: its random numbers.
        phase_images: images of the phase before this step.
        count: accumulation steps of this step.
        last: whether its backward pass reduces gradients over processes.
        adversarial: whether the discriminator takes part.
        report: whether to measure the gradient norm of every term.
    """

    images: Tensor
    draws: Draws
    phase_images: int
    count: int = 1
    last: bool = True
    adversarial: bool = False
    report: bool = False


@dataclass(frozen=True)
class Pass:
    """The forward pass on a part.

    Attributes:
        part: the part.
        noise: posterior noise, [b, z, h, w].
        seen: images that the encoder got.
        output: of the autoencoder.
        leaf: the reconstruction, detached, in at least fp32.
        target: images to compare the reconstruction with.
        hidden: 1 where image losses count, [b, 1, H, W]; None is everywhere.
        smaller_target: gives the images to compare the decoded smaller latent with.
    """

    part: Part
    noise: Tensor
    seen: Tensor
    output: AutoencoderOutput
    leaf: Tensor
    target: Tensor
    hidden: Tensor | None
    smaller_target: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Term:
    """A weighted term of the loss.

    Attributes:
        at: tensor of the forward pass where its gradient enters; the term itself if autograd takes
            it to the parameters.
        gradient: of the term with respect to `at`.
        value: of the term, detached.
        owned: gradients of the parameters that belong to losses.
        scalars: values for the log.
    """

    at: Tensor
    gradient: Tensor
    value: Tensor
    owned: Sequence[Tensor | None] = ()
    scalars: dict[str, Tensor] = field(default_factory=dict)


TermFunction = Callable[[Pass, Tensor | None], Term]  # the gradient so far where it enters -> the term


@dataclass
class AutoencoderLoss:
    """Computes the loss of the autoencoder and accumulates its gradients.

    Attributes:
        recipe: of the phase.
        accelerator: of the run.
        model: the bare autoencoder.
        network: the same, prepared by the accelerator.
        objective: image and latent losses.
        corruption: of images and latents.
        owned: trainable parameters of objective and corruption.
        adversary: the discriminator, if there is one.
    """

    recipe: Recipe
    accelerator: Accelerator
    model: Autoencoder
    network: nn.Module
    objective: Objective
    corruption: Corruption
    owned: Sequence[nn.Parameter]
    adversary: Adversary | None

    def __post_init__(self) -> None:
        self.sampled = self.recipe.model.bottleneck == "gaussian"
        self.contractive = self.recipe.loss.contractive.weight > 0

    def backward(self, part: Part) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Accumulate the autoencoder's gradients for one part.

        Returns:
            Unweighted terms for the log, and what the discriminator compares: targets and detached
                reconstructions.
        """
        found: list[Term] = []
        roots: list[tuple[Tensor, Tensor]] = []
        with reduction(self.accelerator, self.network, part.last):
            passed = self._forward(part)
            for point, functions in self._terms(part):
                gradient = None
                if point == "latent":
                    gradient, roots = _through_decoder(passed, roots), []
                for function in functions:
                    term = function(passed, gradient)
                    gradient = term.gradient if gradient is None else gradient + term.gradient
                    _accumulate(self.owned, term.owned, part.count)
                    found.append(term)
                assert gradient is not None
                at = found[-1].at
                roots.append((at, gradient.to(at.dtype) / part.count))
            _send(roots)
        scalars = {name: value for term in found for name, value in term.scalars.items()}
        scalars["loss/total"] = reduce(torch.add, [term.value for term in found])
        return scalars, passed.target, passed.leaf.detach()

    def _terms(self, part: Part) -> Iterator[tuple[str, list[TermFunction]]]:
        """The terms by the point where their gradient enters, in backward order."""
        yield "reconstruction", [self._image, self._adversarial] if part.adversarial else [self._image]
        if self.recipe.loss.equivariance.downscaled:
            yield "smaller reconstruction", [self._downscaled]
        if self.objective.alignment is not None:
            yield "latent", [self._alignment]
        yield "parameters", [self._latent]

    def _forward(self, part: Part) -> Pass:
        draws, config = part.draws, self.model.config
        _, _, height, width = part.images.shape
        shape = (config.latent_channels, height // config.downsampling, width // config.downsampling)
        seen, hidden = self.corruption.images(part.images, draws, part.phase_images)
        path = self.corruption.latent_path(shape, draws)
        if self.contractive and not seen.requires_grad:
            seen = seen.detach().requires_grad_()
        aligned, noise = self.objective.alignment is not None, draws.normal(shape, "noise")
        with twice_differentiable() if self.contractive else nullcontext():
            output = self.network(
                seen,
                noise=noise,
                sample_posterior=self.sampled,
                latent_transform=path.latent,
                also_decode=path.smaller,
                cut_latent=aligned,
                keep_features=aligned or (part.adversarial and self.recipe.loss.adversarial.adaptive),
            )
        leaf = wide(output.reconstruction.detach()).requires_grad_()
        if hidden is not None:
            hidden = path.target(hidden).round()
        return Pass(part, noise, seen, output, leaf, path.target(part.images), hidden, path.smaller_target)

    def _image(self, passed: Pass, _: Tensor | None) -> Term:
        """Losses between the reconstruction and its target."""
        with self.accelerator.autocast():
            terms = self.objective.image_terms(passed.leaf, passed.target, passed.hidden)
        norms = _norms(terms, [passed.leaf]) if passed.part.report else {}
        gradient, owned = self._differentiate(terms.total, passed.leaf)
        scalars = _logged(terms) | norms
        return Term(passed.output.reconstruction, gradient, terms.total.detach(), owned, scalars)

    def _adversarial(self, passed: Pass, others: Tensor | None) -> Term:
        """The generator's loss.

        An adaptive weight compares it with the other gradients at the decoder's last layer.
        """
        assert self.adversary is not None
        assert others is not None
        options, leaf = self.recipe.loss.adversarial, passed.leaf
        with self.accelerator.autocast():
            loss = self.adversary.generator_loss(leaf)
        (gradient,) = torch.autograd.grad(loss, leaf)
        weight = torch.full((), options.weight, device=leaf.device, dtype=leaf.dtype)
        scalars = {"loss/adversarial": loss.detach()}
        if options.adaptive:
            assert passed.output.decoder_features is not None
            both = torch.cat([others, gradient], dim=1)
            pair = self.model.decoder_weight_gradient(passed.output.decoder_features, both).chunk(2)
            scalars["adversarial/ratio"] = self._ratio(pair, options.max_ratio)
            weight = weight * scalars["adversarial/ratio"]
        if passed.part.report:
            scalars["gradient_norm/adversarial"] = weight * torch.linalg.vector_norm(gradient)
        at = passed.output.reconstruction
        return Term(at, weight * gradient, weight * loss.detach(), scalars=scalars)

    def _downscaled(self, passed: Pass, _: Tensor | None) -> Term:
        """Losses between the decoded smaller latent and the smaller image."""
        smaller, weight = passed.output.also, self.recipe.loss.equivariance.downscaled
        assert smaller is not None
        leaf = wide(smaller.detach()).requires_grad_()
        with self.accelerator.autocast():
            terms = self.objective.image_terms(leaf, passed.smaller_target(passed.part.images))
        gradient, owned = self._differentiate(terms.total, leaf, weight)
        value = terms.total.detach()
        return Term(smaller, gradient, weight * value, owned, {"loss/downscaled": value})

    def _alignment(self, passed: Pass, through_decoder: Tensor | None) -> Term:
        """Alignment of the latent.

        An adaptive weight compares it with the other gradients at the encoder's last layer.
        """
        assert self.objective.alignment is not None
        assert through_decoder is not None
        options, output = self.recipe.loss.alignment, passed.output
        leaf = wide(output.latent.detach()).requires_grad_()
        with self.accelerator.autocast():
            loss = self.objective.alignment(leaf, passed.part.images).mean()
        gradient, owned = self._differentiate(loss, leaf)
        weight = torch.full((), options.weight, device=leaf.device, dtype=leaf.dtype)
        scalars = {"loss/alignment": loss.detach()}
        if options.adaptive:
            assert output.encoder_features is not None
            features, noise = output.encoder_features, passed.noise if self.sampled else None
            pair = [
                self.model.encoder_weight_gradient(features, noise, g) for g in (through_decoder, gradient)
            ]
            scalars["alignment/ratio"] = self._ratio(pair, math.inf)
            weight = weight * scalars["alignment/ratio"]
        if passed.part.report:
            scalars["gradient_norm/alignment"] = weight * torch.linalg.vector_norm(gradient)
            scalars["gradient_norm/through_decoder"] = torch.linalg.vector_norm(through_decoder)
        owned = [None if g is None else weight * g for g in owned]
        return Term(output.latent, weight * gradient, weight * loss.detach(), owned, scalars)

    def _latent(self, passed: Pass, _: Tensor | None) -> Term:
        """Losses on the posterior, which autograd takes to the parameters."""
        part, output = passed.part, passed.output
        with self.accelerator.autocast():
            terms = self.objective.latent_terms(
                output, part.images, reduce=partial(mean_over_processes, self.accelerator)
            )
            if self.contractive:
                shape = (self.recipe.loss.contractive.probes, *output.latent.shape[1:])
                probes = part.draws.normal(shape, "contractive").transpose(0, 1)
                terms = terms.merged(self.objective.contractive_terms(output, passed.seen, probes))
        posterior = output.posterior
        norms = _norms(terms, [posterior.mean, posterior.logvar]) if part.report else {}
        total = terms.total
        return Term(total, torch.ones_like(total), total.detach(), scalars=_logged(terms) | norms)

    def _differentiate(
        self, loss: Tensor, leaf: Tensor, weight: float = 1.0
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Weighted gradients of a loss at a leaf and at the losses' own parameters."""
        gradients = torch.autograd.grad(loss, [leaf, *self.owned], allow_unused=True)
        if weight != 1.0:
            gradients = [None if g is None else weight * g for g in gradients]
        gradient, *owned = gradients
        assert gradient is not None
        return gradient, owned

    def _ratio(self, gradients: Sequence[Tensor], limit: float) -> Tensor:
        """|first| / (|second| + eps), at most `limit`.

        Of gradients [2 x weight] averaged over processes.
        """
        pair = mean_over_processes(self.accelerator, torch.stack(list(gradients)))
        reference, other = pair.flatten(1).norm(dim=1)
        return (reference / (other + RATIO_EPS)).clamp(0.0, limit).detach()


def _through_decoder(passed: Pass, roots: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Run the decoder's backward pass.

    Returns the gradient that arrives at the latent, of the mean over this part.
    """
    _send(roots)
    assert passed.output.leaf is not None
    assert passed.output.leaf.grad is not None
    return wide(passed.output.leaf.grad) * passed.part.count


def _send(roots: list[tuple[Tensor, Tensor]]) -> None:
    """One backward pass from all tensors that have a graph: those of a frozen encoder have none."""
    tensors, gradients = zip(*(root for root in roots if root[0].requires_grad), strict=True)
    torch.autograd.backward(tensors, gradients)


def _accumulate(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], count: int) -> None:
    # not strict: terms that use none of the parameters have no gradients
    for parameter, gradient in zip(parameters, gradients, strict=False):
        if gradient is not None:
            share = gradient / count
            parameter.grad = share if parameter.grad is None else parameter.grad + share


def _logged(terms: LossTerms) -> dict[str, Tensor]:
    return {f"loss/{name}": value for name, value in terms.scalars.items()}


def _norms(terms: LossTerms, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    """Norm of every weighted term's gradient at `inputs`, for the log; the graph is kept."""
    inputs = [x for x in inputs if x.requires_grad]
    norms = {}
    for name, term in terms.weighted.items():
        if inputs and term.requires_grad:
            gradients = torch.autograd.grad(term, inputs, retain_graph=True, allow_unused=True)
            parts = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
            if parts:
                norms[f"gradient_norm/{name}"] = torch.stack(parts).norm()
    return norms
