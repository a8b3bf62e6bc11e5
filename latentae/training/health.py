"""Watchdog: warns of common faults of long runs, from the metrics that a run reports."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentae.training.recipe import Recipe

__all__ = ["Watchdog"]

# Mean logit of real minus fake patches above which a discriminator that is always right has stopped
# learning. Hinge has no gradient outside [-1, 1]; a logistic loss at 8 has sigmoid(-4) = 2 %.
SATURATED_GAP = {"hinge": 2.5, "vanilla": 8.0, "non-saturating": 8.0}
MEANT_TO_BIND = 1.0  # a max_ratio up to this is a choice (LDM's is 0.051), so reaching it is no fault
COLLAPSED_KL, LARGE_KL = 0.01, 1000.0  # nats per latent number; 1000 is a mean near 45 standard deviations
PSNR_DROP = 1.0  # dB
SPIKE, MEMORY, FEWEST = 10.0, 50, 10  # times the median of up to 50 reports, at least 10
WAIT = 0.2  # share of the time

Finding = tuple[str, bool, str]  # name, whether it shows, message


@dataclass
class _Symptom:
    """Counts consecutive reports with and without a fault.

    Attributes:
        patience: consecutive reports until a warning, and until the fault has passed.
        span: images that these reports must span, for runs that report every step.
    """

    patience: int
    span: float
    shown: int = 0
    since: int = 0
    calm: int = 0
    warned: bool = False

    def see(self, there: bool, images: int) -> bool:
        """Whether to warn now."""
        if there and not self.shown:
            self.since = images
        self.shown, self.calm = (self.shown + 1, 0) if there else (0, self.calm + 1)
        if self.calm >= self.patience:
            self.warned = False
        warn = self.shown >= self.patience and images - self.since >= self.span and not self.warned
        self.warned |= warn
        return warn


_PATIENCE = {  # reports, and share of the phase
    "winning": (5, 0.01),
    "capped": (20, 0.03),
    "lost": (20, 0.03),
    "psnr": (1, 0.0),
    "kl/low": (5, 0.01),
    "kl/high": (3, 0.0),
    "spike": (1, 0.0),
    "wait": (3, 0.005),
}


class Watchdog:
    """Checks the reported terms of one phase and returns warnings, each once until it has passed.

    It does not stop a run. Healthy runs get no warnings.

    Args:
        recipe: of the phase.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.game, self.images, config = recipe.loss.adversarial, recipe.images, recipe.autoencoder_config()
        # loss/kl is summed over the latent and divided by image elements; nats per latent number:
        self.per_latent = config.in_channels * config.downsampling**2 / config.latent_channels
        self.symptoms: dict[str, _Symptom] = {}
        self.norms: dict[str, deque[float]] = {}
        self.best_psnr, self.best_at = -math.inf, 0
        self.playing = False

    def check(self, images: int, values: Mapping[str, float | None]) -> list[str]:
        """New warnings: what was found, what it usually means, which option to change.

        Args:
            images: seen so far.
            values: terms of a report or validation, such as a line of metrics.jsonl.
        """
        known = {name: value for name, value in values.items() if isinstance(value, int | float)}
        terms = {name: float(value) for name, value in known.items() if math.isfinite(value)}
        found = []
        for name, there, message in self._findings(images, terms):
            reports, share = _PATIENCE[name.partition(":")[0]]
            if self.symptoms.setdefault(name, _Symptom(reports, share * self.images)).see(there, images):
                found.append(message)
        return found

    def _findings(self, images: int, terms: Mapping[str, float]) -> Iterator[Finding]:
        """All faults that these terms can show."""
        yield from self._discriminator(terms)
        yield from self._quality(images, terms)
        yield from self._posterior(terms)
        yield from self._gradients(terms)
        if "data_wait" in terms:
            share = f"{terms['data_wait']:.0%} of the time"
            wait = f"training waits for data {share}: decoding or the disk is too slow"
            advice = "raise data.workers, or store smaller images (latentae shards --resize)"
            yield "wait", terms["data_wait"] > WAIT, f"{wait}; {advice}"

    def _discriminator(self, terms: Mapping[str, float]) -> Iterator[Finding]:
        names = ("accuracy_real", "accuracy_fake", "logits_real", "logits_fake")
        if not all(f"discriminator/{name}" in terms for name in names):
            return
        self.playing = True
        real, fake, on_real, on_fake = (terms[f"discriminator/{name}"] for name in names)
        gap, right = on_real - on_fake, min(real, fake)
        seen = f"{real:.0%} of real and {fake:.0%} of reconstructed patches correct, logits {gap:.2f} apart"
        won = f"the discriminator has won ({seen}): it no longer tells the autoencoder what to improve"
        advice = "lower optimizer.discriminator_lr, or add loss.adversarial.r1 or lecam"
        yield "winning", right >= 0.99 and gap > SATURATED_GAP[self.game.loss], f"{won}; {advice}"
        lost = f"the discriminator does not learn ({seen}): its gradient is noise"
        advice = "raise optimizer.discriminator_lr, or lower loss.adversarial.r1 or lecam"
        yield "lost", abs((real + fake) / 2 - 0.5) < 0.05 and abs(gap) < 0.1, f"{lost}; {advice}"
        if self.game.adaptive and "adversarial/ratio" in terms:
            ratio, most = terms["adversarial/ratio"], self.game.max_ratio
            capped = ratio >= 0.999 * most and (most > MEANT_TO_BIND or right >= 0.95)
            message = (
                f"the adaptive ratio has stayed at its maximum, {most:g}: the discriminator sends almost "
                "no gradient; check its accuracy, lower optimizer.discriminator_lr, or set "
                "loss.adversarial.adaptive = false"
            )
            yield "capped", capped, message

    def _quality(self, images: int, terms: Mapping[str, float]) -> Iterator[Finding]:
        if "validation/psnr" not in terms:
            return
        psnr = terms["validation/psnr"]
        seen = f"held-out PSNR is {psnr:.2f} dB after {self.best_psnr:.2f} dB at image {self.best_at}"
        cause = "the run diverges or overfits its few images; lower optimizer.lr, or add images"
        if self.playing:
            cause = "the adversarial term costs too much; lower loss.adversarial.weight or max_ratio"
        yield "psnr", psnr < self.best_psnr - PSNR_DROP, f"{seen}: {cause}"
        if psnr > self.best_psnr:
            self.best_psnr, self.best_at = psnr, images

    def _posterior(self, terms: Mapping[str, float]) -> Iterator[Finding]:
        if "loss/kl" not in terms:
            return
        nats = terms["loss/kl"] * self.per_latent
        found = f"({nats:.3g} nats of KL per latent number)"
        low = f"the posterior has collapsed {found}: every image has the same latent distribution, N(0, 1)"
        yield "kl/low", nats < COLLAPSED_KL, f"{low}; lower loss.kl, or start with model.initial_logvar = -6"
        high = f"the latent diverges {found}: its values do not fit half precision or a diffusion model"
        yield "kl/high", nats > LARGE_KL, f"{high}; raise loss.kl or lower optimizer.lr"

    def _gradients(self, terms: Mapping[str, float]) -> Iterator[Finding]:
        for network, option in (("autoencoder", "lr"), ("discriminator", "discriminator_lr")):
            norm = terms.get(f"gradient_norm/{network}")
            if norm is None:
                continue
            recent = self.norms.setdefault(network, deque(maxlen=MEMORY))
            usual = statistics.median(recent) if len(recent) >= FEWEST else math.inf
            jump = f"jumped to {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}"
            advice = f"lower optimizer.max_grad_norm, which clips such steps, or optimizer.{option}"
            message = f"the gradient norm of the {network} {jump}: one such step may undo many; {advice}"
            yield f"spike:{network}", norm > SPIKE * usual, message
            recent.append(norm)
