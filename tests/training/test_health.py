"""The watchdog on artificial curves with one fault each, and on healthy ones."""

from __future__ import annotations

import math
import random

import pytest

from latentae.training.health import Watchdog
from latentae.training.recipe import recipe_options


@pytest.fixture
def watchdog(small):
    def make(**overrides):
        return Watchdog(
            small(
                **{
                    "images": 1600,
                    "loss.adversarial.weight": 0.5,
                    "loss.adversarial.adaptive": True,
                    **overrides,
                }
            )
        )

    return make


def report(step, noise=None, **changed):
    """A line of a run that goes well, with the discriminator playing.

    Noise as single steps have it.
    """
    jitter = (lambda spread: noise.gauss(0, spread)) if noise else lambda spread: 0.0
    values = {
        "loss/total": 0.1 + 1 / (step + 5),
        "loss/kl": 0.5,  # 6 nats per latent number at f4 z4
        "gradient_norm/autoencoder": math.exp(0.5 * jitter(1)) * (0.2 + 3 / (step + 1)),
        "gradient_norm/discriminator": math.exp(0.5 * jitter(1)),
        "adversarial/ratio": 3.0 * math.exp(0.5 * jitter(1)),
        "discriminator/logits_real": 0.4 + jitter(0.3),
        "discriminator/logits_fake": -0.4 + jitter(0.3),
        "discriminator/accuracy_real": min(1.0, 0.72 + jitter(0.1)),
        "discriminator/accuracy_fake": min(1.0, 0.7 + jitter(0.1)),
        "data_wait": 0.02 + abs(jitter(0.02)),
        "img_per_s": 30.0,
        "lr": 1e-4,
    }
    return values | changed


def say(watchdog, reports):
    """What it says of reports, each in one line that names an option."""
    messages = [
        message for step, values in enumerate(reports) for message in watchdog.check(8 * step, values)
    ]
    for message in messages:
        assert "\n" not in message
        assert any(
            option in message or option.rpartition(".")[2] in message.split() for option in recipe_options()
        ), message
    return messages


def won(step):
    return report(
        step,
        **{
            "discriminator/accuracy_real": 1.0,
            "discriminator/accuracy_fake": 0.995,
            "discriminator/logits_real": 1.6,
            "discriminator/logits_fake": -1.5,
        },
    )


@pytest.mark.parametrize("seed", range(8))
def test_a_healthy_run_is_silent(watchdog, seed):
    noise = random.Random(seed)
    plain = {
        key: value for key, value in report(0).items() if not key.startswith(("discriminator", "adversarial"))
    }
    reports = []
    for step in range(400):
        values = report(step, noise)
        reports.append(values if step > 150 else {key: values[key] for key in plain})  # the game starts late
        if step % 20 == 0:
            reports.append(
                {
                    "validation/psnr": 20 + 6 * (1 - math.exp(-step / 80)) + noise.gauss(0, 0.1),
                    "validation/ssim": 0.7,
                }
            )
    reports += [
        {},
        {"loss/kl": None, "gradient_norm/autoencoder": math.nan, "validation/psnr": math.inf, "time": 1e9},
    ]
    assert say(watchdog(), reports) == []


def test_the_first_reports_of_a_game_are_no_illness(watchdog):
    undecided = {f"discriminator/{name}": 0.0 for name in ("logits_real", "logits_fake")}
    undecided |= {f"discriminator/accuracy_{name}": 0.5 for name in ("real", "fake")}
    assert (
        say(
            watchdog(),
            [report(step, **undecided) for step in range(15)] + [report(step) for step in range(50)],
        )
        == []
    )


def test_a_discriminator_that_has_won_is_said_once_until_it_recovers(watchdog):
    ill = [won(step) for step in range(30)]
    found = say(watchdog(), [report(0), *ill])
    assert len(found) == 1
    assert "has won (100% of real and 100% of" in found[0]
    assert "logits 3.10 apart" in found[0]
    assert "optimizer.discriminator_lr" in found[0]
    healthy = [report(step) for step in range(10)]
    assert len(say(watchdog(), [*ill, *healthy, *ill])) == 2
    assert len(say(watchdog(), [*ill, *healthy[:2], *ill])) == 1, "a moment's health is no recovery"
    assert say(watchdog(), [*ill[:4], report(0), *ill[:4]]) == []


def test_a_run_that_reports_every_step_is_not_judged_by_its_first_steps(watchdog):
    collapsed = [report(step, **{"loss/kl": 0.0}) for step in range(100)]
    assert say(watchdog(images=100_000), collapsed) == []
    assert len(say(watchdog(images=10_000), collapsed)) == 1


def test_a_logistic_loss_may_put_logits_further_apart(watchdog):
    ill = [won(step) for step in range(30)]
    assert say(watchdog(**{"loss.adversarial.loss": "non-saturating"}), ill) == []


def test_a_ratio_at_its_cap_is_an_illness_unless_the_cap_was_meant_to_bind(watchdog):
    def capped(ratio):
        return [report(step, **{"adversarial/ratio": ratio}) for step in range(40)]

    (message,) = say(watchdog(), capped(1e4))
    assert "stayed at its maximum, 10000" in message
    assert say(watchdog(), capped(1e4)[:19]) == []
    assert say(watchdog(**{"loss.adversarial.max_ratio": 0.051}), capped(0.051)) == []
    winning = [won(step) | {"adversarial/ratio": 0.051} for step in range(40)]
    assert len(say(watchdog(**{"loss.adversarial.max_ratio": 0.051}), winning)) == 2
    assert say(watchdog(**{"loss.adversarial.adaptive": False}), capped(1e4)) == []


@pytest.mark.parametrize(("real", "fake"), [(0.5, 0.5), (1.0, 0.0), (0.52, 0.47)])
def test_a_discriminator_that_learns_nothing(watchdog, real, fake):
    dead = {"discriminator/accuracy_real": real, "discriminator/accuracy_fake": fake}
    dead |= {"discriminator/logits_real": 0.01, "discriminator/logits_fake": 0.0}
    (message,) = say(watchdog(), [report(step, **dead) for step in range(60)])
    assert "does not learn" in message


def test_psnr_that_falls_names_the_cause_by_who_plays(watchdog):
    def psnr(value):
        return {"validation/psnr": value}

    (message,) = say(watchdog(), [psnr(20), psnr(24), psnr(23.2), report(0), psnr(22.9), psnr(22.0)])
    assert "22.90 dB after 24.00 dB at image 8: the adversarial term" in message
    (message,) = say(watchdog(), [psnr(24), psnr(22)])
    assert "diverges" in message
    assert len(say(watchdog(), [psnr(24), psnr(22), psnr(24), psnr(22)])) == 2
    assert say(watchdog(), [psnr(24), psnr(23.1), psnr(None)]) == []


def test_kl_that_collapses_or_runs_away(watchdog):
    (message,) = say(watchdog(), [report(step, **{"loss/kl": 1e-5}) for step in range(10)])
    assert "posterior has collapsed" in message
    (message,) = say(watchdog(), [report(step, **{"loss/kl": 400.0}) for step in range(10)])
    assert "diverges" in message
    assert say(watchdog(), [report(0, **{"loss/kl": 0.0}), report(1)]) == [], (
        "a first step from zero is no collapse"
    )


def test_a_jump_of_the_gradient_norm(watchdog):
    calm = [report(step) for step in range(20, 60)]
    jump = report(60, **{"gradient_norm/autoencoder": 9.0})
    (message,) = say(watchdog(), [*calm, jump, *calm])
    assert "of the autoencoder jumped to 9" in message
    assert say(watchdog(), [report(step) for step in range(9)] + [jump]) == [], (
        "too few to know what is usual"
    )
    (message,) = say(watchdog(), [*calm, *[report(60, **{"gradient_norm/discriminator": 50.0})] * 100])
    assert "optimizer.discriminator_lr" in message
    assert len(say(watchdog(), [*calm, jump, *calm, jump])) == 2


def test_waiting_for_data(watchdog):
    slow = [report(step, data_wait=0.4) for step in range(10)]
    (message,) = say(watchdog(), slow)
    assert "waits for data 40% of the time" in message
    assert say(watchdog(), [slow[0], report(1), slow[0], slow[0], report(2)]) == [], (
        "a moment of it is not worth a word"
    )
