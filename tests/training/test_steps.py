"""The training step against the naive formula: one loss, one graph, one backward."""

from __future__ import annotations

import pytest
import torch

from latentae.losses.adversarial import hinge_discriminator, hinge_generator
from latentae.training.keyed import keyed_normal
from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.steps import Trainer

ADVERSARIAL = {"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}


@pytest.fixture
def accelerator():
    accelerator = build_accelerator("fp32")
    yield accelerator
    close_accelerator(accelerator)


def images(count: int = 4) -> torch.Tensor:
    """Smooth pictures: noise can't be compressed, so nothing could be learned from it."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear") * 255).to(torch.uint8)


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_gradients_equal_the_naive_formula_in_fp64(small, accelerator):
    trainer = Trainer(small(**ADVERSARIAL, **{"loss.l1": 1.0, "loss.l2": 0.7, "loss.kl": 1e-3}), accelerator)
    trainer.raw_autoencoder.double()
    trainer.raw_discriminator.double()
    x = images().double() / 127.5 - 1
    noise = keyed_normal((4, 8, 8, 8), 0, 0, 0)

    out = trainer.raw_autoencoder(x, noise=noise)
    difference = out.reconstruction - x
    naive = difference.abs().mean() + 0.7 * difference.square().mean()
    naive = naive + 0.3 * hinge_generator(trainer.raw_discriminator(out.reconstruction)).mean()
    naive = naive + 1e-3 * out.posterior.kl().mean() / x[0].numel()
    naive.backward()
    expected = gradients(trainer.raw_autoencoder)
    trainer.raw_autoencoder.zero_grad()
    trainer.raw_discriminator.zero_grad()

    scalars, fake = trainer._autoencoder_backward(x, 0, 1, adversarial=True, synchronize=True)
    assert gradients(trainer.raw_autoencoder).keys() == expected.keys()
    for name, value in gradients(trainer.raw_autoencoder).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-13, msg=name)
    assert scalars["loss/total"].item() == pytest.approx(naive.item(), rel=1e-10)
    assert not gradients(trainer.raw_discriminator), "the autoencoder's loss must not train the discriminator"

    before = gradients(trainer.raw_autoencoder)
    trainer._discriminator_backward(x, fake, 1, synchronize=True)
    got = gradients(trainer.raw_discriminator)
    trainer.raw_discriminator.zero_grad()
    hinge_discriminator(trainer.raw_discriminator(x), trainer.raw_discriminator(fake)).mean().backward()
    for name, value in gradients(trainer.raw_discriminator).items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-13, msg=name)
    for name, value in gradients(trainer.raw_autoencoder).items():
        assert torch.equal(value, before[name]), "the discriminator's loss must not train the autoencoder"


def test_accumulation_equals_one_large_batch(small, accelerator):
    whole = Trainer(small(**ADVERSARIAL, **{"optimizer.max_grad_norm": 0}), accelerator)
    cut = Trainer(small(**ADVERSARIAL, **{"optimizer.max_grad_norm": 0}), accelerator)
    for _ in range(2):
        a = whole.update([images()])
        b = cut.update(list(images().split(2)))
    for (name, p), q in zip(whole.raw_autoencoder.named_parameters(), cut.raw_autoencoder.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)
    for (name, p), q in zip(whole.raw_discriminator.named_parameters(), cut.raw_discriminator.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-4, msg=name)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4, msg=name)


def test_the_discriminator_rests_until_its_start(small, accelerator):
    trainer = Trainer(small(**ADVERSARIAL, **{"loss.adversarial.start_images": 8}), accelerator)
    start = [p.clone() for p in trainer.raw_discriminator.parameters()]
    for _ in range(2):
        terms = trainer.update([images()])
        assert "loss/discriminator" not in terms
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.raw_discriminator.parameters(), strict=True))
    assert "loss/discriminator" in trainer.update([images()])
    assert not all(torch.equal(a, b) for a, b in zip(start, trainer.raw_discriminator.parameters(), strict=True))


def test_training_lowers_the_loss_and_moves_the_average(small, accelerator):
    trainer = Trainer(small(images=800, **{"optimizer.lr": 3e-3, "optimizer.warmup_images": 0}), accelerator)
    losses = [trainer.update([images()])["loss/total"].item() for _ in range(80)]
    assert losses[-1] < 0.7 * losses[0]
    name, weight = next(iter(trainer.raw_autoencoder.named_parameters()))
    assert not torch.equal(trainer.ema.weights[name], weight)
    assert trainer.state.images_seen == 320


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(small, accelerator):
    a, b, c = (Trainer(small(seed=seed), accelerator) for seed in (0, 0, 1))
    for trainer in (a, b, c):
        trainer.update([images()])
    first = [next(iter(t.raw_autoencoder.parameters())) for t in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_initial_logvar_is_what_the_posterior_starts_with(small, accelerator):
    trainer = Trainer(small(**{"model.initial_logvar": -6}), accelerator)
    logvar = trainer.raw_autoencoder.encode(images().float() / 127.5 - 1).logvar
    assert -7 < logvar.mean().item() < -5
