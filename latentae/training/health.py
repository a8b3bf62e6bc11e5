"""What goes wrong in long runs, seen in the numbers a run reports anyway, and said in one line each."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentae.training.recipe import Recipe

__all__ = ["Watchdog"]

# Mean logit of real minus that of fake patches past which a discriminator that is right everywhere has stopped learning: hinge
# has no gradient outside of [-1, 1]; of a logistic loss, 8 leaves a gradient of sigmoid(-4) = 2 % on each side.
SATURATED_GAP = {"hinge": 2.5, "vanilla": 8.0, "non-saturating": 8.0}
MEANT_TO_BIND = (
    1.0  # a largest ratio up to this is a choice (LDM's is 0.051): being at it says nothing by itself
)
COLLAPSED_KL, LARGE_KL = 0.01, 1000.0  # nats per latent number; 1000 is a mean near 45 standard deviations
PSNR_DROP = 1.0  # dB
SPIKE, MEMORY, FEWEST = 10.0, 50, 10  # times the median of the last reports, of which there must be some
WAIT = 0.2  # share of the time


@dataclass
class _Symptom:
    """Counts reports that show something, and those that do not.

    Attributes:
        patience: reports in a row until it is said, and as many without it until it may be said again.
        span: images that those reports must span: a run that reports every step has only just begun after twenty.
    """

    patience: int
    span: float
    shown: int = 0
    since: int = 0
    calm: int = 0
    said: bool = False

    def see(self, there: bool, images: int) -> bool:
        """Whether to say it now."""
        if there and not self.shown:
            self.since = images
        self.shown, self.calm = (self.shown + 1, 0) if there else (0, self.calm + 1)
        if self.calm >= self.patience:
            self.said = False
        say = self.shown >= self.patience and images - self.since >= self.span and not self.said
        self.said |= say
        return say


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
    """Reads the terms of one phase as they are reported and says what looks wrong, each thing once until it has passed.

    It decides nothing: a run goes on. Thresholds are set so that runs that end well stay silent.

    Args:
        recipe: of the phase.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.game, self.images, config = recipe.loss.adversarial, recipe.images, recipe.autoencoder_config()
        # loss/kl is a sum over the latent divided by image elements; this makes it nats per latent number
        self.per_latent = config.in_channels * config.downsampling**2 / config.latent_channels
        self.symptoms: dict[str, _Symptom] = {}
        self.norms: dict[str, deque[float]] = {}
        self.best_psnr, self.best_at = -math.inf, 0
        self.playing = False

    def check(self, images: int, values: Mapping[str, float | None]) -> list[str]:
        """What is newly wrong: what was seen, what it usually means, which option to turn.

        Args:
            images: seen so far.
            values: a report's terms or a validation's (a line of metrics.jsonl does, too); what it does not know is ignored.
        """
        terms = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        found = []
        for name, there, message in self._findings(images, terms):
            reports, share = _PATIENCE[name.partition(":")[0]]
            if self.symptoms.setdefault(name, _Symptom(reports, share * self.images)).see(there, images):
                found.append(message)
        return found

    def _findings(self, images: int, terms: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        """(name, whether it shows, message) of everything that these terms can tell."""
        yield from self._discriminator(terms)
        yield from self._quality(images, terms)
        yield from self._posterior(terms)
        yield from self._gradients(terms)
        if "data_wait" in terms:
            share = terms["data_wait"]
            yield (
                "wait",
                share > WAIT,
                (
                    f"training waits for data {share:.0%} of the time: decoding or the disk is too slow; raise data.workers, or "
                    "store smaller images (latentae shards --resize)"
                ),
            )

    def _discriminator(self, terms: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        names = ("accuracy_real", "accuracy_fake", "logits_real", "logits_fake")
        if not all(f"discriminator/{name}" in terms for name in names):
            return
        self.playing = True
        real, fake, on_real, on_fake = (terms[f"discriminator/{name}"] for name in names)
        gap, right = on_real - on_fake, min(real, fake)
        seen = f"{real:.0%} of real and {fake:.0%} of reconstructed patches judged rightly, logits {gap:.2f} apart"
        yield (
            "winning",
            right >= 0.99 and gap > SATURATED_GAP[self.game.loss],
            (
                f"the discriminator has won ({seen}): it no longer tells the autoencoder what to improve; lower "
                "optimizer.discriminator_lr, or add loss.adversarial.r1 or lecam"
            ),
        )
        yield (
            "lost",
            abs((real + fake) / 2 - 0.5) < 0.05 and abs(gap) < 0.1,
            (
                f"the discriminator does not learn ({seen}): what it sends is noise; raise optimizer.discriminator_lr, or lower "
                "loss.adversarial.r1 or lecam"
            ),
        )
        if self.game.adaptive and "adversarial/ratio" in terms:
            ratio, most = terms["adversarial/ratio"], self.game.max_ratio
            capped = ratio >= 0.999 * most and (most > MEANT_TO_BIND or right >= 0.95)
            yield (
                "capped",
                capped,
                (
                    f"the adaptive ratio has stayed at its largest, {most:g}: the discriminator sends almost no gradient; see to its "
                    "accuracy, lower optimizer.discriminator_lr, or make loss.adversarial.adaptive false"
                ),
            )

    def _quality(self, images: int, terms: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        if "validation/psnr" not in terms:
            return
        psnr = terms["validation/psnr"]
        seen = f"held-out PSNR is {psnr:.2f} dB after {self.best_psnr:.2f} dB at image {self.best_at}"
        cause = (
            "the adversarial term costs more than it should; lower loss.adversarial.weight or max_ratio, or start it later"
            if self.playing
            else "the run diverges or learns its few images by heart; lower optimizer.lr, or add images"
        )
        yield "psnr", psnr < self.best_psnr - PSNR_DROP, f"{seen}: {cause}"
        if psnr > self.best_psnr:
            self.best_psnr, self.best_at = psnr, images

    def _posterior(self, terms: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        if "loss/kl" not in terms:
            return
        nats = terms["loss/kl"] * self.per_latent
        yield (
            "kl/low",
            nats < COLLAPSED_KL,
            (
                f"the posterior has collapsed ({nats:.2g} nats of KL per latent number): every image gets the same N(0, 1), and the "
                "decoder nothing; lower loss.kl, or begin with model.initial_logvar = -6"
            ),
        )
        yield (
            "kl/high",
            nats > LARGE_KL,
            (
                f"the latent runs away ({nats:.3g} nats of KL per latent number): its values will not fit half precision or a diffusion "
                "model; raise loss.kl or lower optimizer.lr"
            ),
        )

    def _gradients(self, terms: Mapping[str, float]) -> Iterator[tuple[str, bool, str]]:
        for network, option in (("autoencoder", "lr"), ("discriminator", "discriminator_lr")):
            norm = terms.get(f"gradient_norm/{network}")
            if norm is None:
                continue
            recent = self.norms.setdefault(network, deque(maxlen=MEMORY))
            usual = statistics.median(recent) if len(recent) >= FEWEST else math.inf
            yield (
                f"spike:{network}",
                norm > SPIKE * usual,
                (
                    f"the gradient norm of the {network} jumped to {norm:.3g}, {norm / usual:.0f} times the usual {usual:.3g}: a step "
                    f"that may undo many; lower optimizer.max_grad_norm (such steps are cut to it) or optimizer.{option}"
                ),
            )
            recent.append(norm)
