"""The training step against the naive formulas: one loss, one graph, retained backward passes for the ratios."""

from __future__ import annotations

import math

import pytest
import torch

from latentae.losses.adversarial import discriminator_loss, generator_loss, twice_differentiable
from latentae.losses.spectrum import spectrum_matching
from latentae.training.keyed import keyed_normal, keyed_uniform
from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.steps import Part, Trainer

ADVERSARIAL = {"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}
ALIGNED = {
    "loss.alignment.weight": 0.1,
    "loss.alignment.backbone": "efficientnet-lite0",
}


@pytest.fixture
def accelerator():
    accelerator = build_accelerator("fp32")
    yield accelerator
    close_accelerator(accelerator)


def images(count: int = 4) -> torch.Tensor:
    """Smooth pictures: noise can't be compressed, so nothing could be learned from it."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear") * 255).to(torch.uint8)


def gradients(*modules: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for index, module in enumerate(modules):
        found |= {f"{index}.{name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        module.zero_grad()
    return found


def in_fp64(recipe, accelerator) -> Trainer:
    trainer = Trainer(recipe, accelerator)
    trainer.raw_autoencoder.double()
    trainer.objective.double()
    if trainer.raw_discriminator is not None:
        trainer.raw_discriminator.double()
    return trainer


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=1e-13, msg=name)


@pytest.mark.parametrize("kind", ["hinge", "vanilla", "non-saturating"])
@pytest.mark.parametrize("network", ["patch", "unet"])
def test_constant_weights_equal_the_naive_formula(kind, network, small, accelerator):
    recipe = small(
        **ADVERSARIAL,
        **{
            "loss.l1": 1.0,
            "loss.l2": 0.7,
            "loss.kl": 1e-3,
            "loss.adversarial.loss": kind,
            "loss.adversarial.discriminator": network,
        },
    )
    trainer = in_fp64(recipe, accelerator)
    model, judge = trainer.raw_autoencoder, trainer.raw_discriminator
    x = images().double() / 127.5 - 1

    out = model(x, noise=keyed_normal((4, 8, 8, 8), 0, 0, 0))
    difference = out.reconstruction - x
    naive = difference.abs().mean() + 0.7 * difference.square().mean()
    naive = naive + 0.3 * generator_loss(kind, judge(out.reconstruction)).mean()
    naive = naive + 1e-3 * out.posterior.kl().mean() / x[0].numel()
    naive.backward()
    judge.zero_grad()
    expected = gradients(model)

    scalars, _, fake = trainer._autoencoder_backward(Part(x, adversarial=True))
    assert all(p.grad is None for p in judge.parameters()), "the autoencoder's loss must not train the discriminator"
    assert_equal(gradients(model), expected)
    assert scalars["loss/total"].item() == pytest.approx(naive.item(), rel=1e-10)

    trainer.adversary.backward(x, fake, 1, True, step=0)
    assert all(p.grad is None for p in model.parameters()), "the discriminator's loss must not train the autoencoder"
    got = gradients(judge)
    discriminator_loss(kind, judge(x), judge(fake)).mean().backward()
    assert_equal(got, gradients(judge))


def naive_ratio(reference, other, weight, limit=math.inf):
    """VQGAN's eq. 7 as LDM's code has it: two retained backward passes."""
    a = torch.autograd.grad(reference, weight, retain_graph=True)[0]
    b = torch.autograd.grad(other, weight, retain_graph=True)[0]
    return (a.norm() / (b.norm() + 1e-4)).clamp(0, limit).detach()


@pytest.mark.parametrize("limit", [1e4, 0.05])
@pytest.mark.parametrize("learned", [False, True])
def test_the_adaptive_weight_equals_the_naive_formula(limit, learned, small, accelerator):
    recipe = small(
        **ADVERSARIAL,
        **{
            "loss.adversarial.adaptive": True,
            "loss.adversarial.max_ratio": limit,
            "loss.kl": 1e-3,
            "loss.l1": 1.0,
            "loss.l2": 0.0,
        },
        **{"loss.learn_logvar": learned, "loss.initial_logvar": 0.4},
    )
    trainer = in_fp64(recipe, accelerator)
    model, judge = trainer.raw_autoencoder, trainer.raw_discriminator
    x = images().double() / 127.5 - 1
    s = trainer.objective.logvar if learned else torch.tensor(0.4, dtype=torch.float64)

    out = model(x, noise=keyed_normal((4, 8, 8, 8), 0, 0, 0))
    # LDM's contperceptual, per element: the reconstruction likelihood, the generator's term and the KL
    likelihood = (out.reconstruction - x).abs().mean() / torch.exp(s) + (s if learned else 0)
    game = -torch.stack([logits.mean() for logits in judge(out.reconstruction)]).mean()
    ratio = naive_ratio(likelihood, game, model.decoder.conv_out.weight, limit)
    (likelihood + 0.3 * ratio * game + 1e-3 * out.posterior.kl().mean() / x[0].numel()).backward()
    judge.zero_grad()
    expected = gradients(model, trainer.objective)

    scalars, *_ = trainer._autoencoder_backward(Part(x, adversarial=True))
    assert_equal(gradients(model, trainer.objective), expected)
    assert scalars["adversarial/ratio"].item() == pytest.approx(ratio.item(), rel=1e-9)


@pytest.mark.parametrize("part", ["all", "encoder", "latent"])
def test_the_alignment_equals_the_naive_formula(part, small, accelerator):
    recipe = small(**ALIGNED, **{"model.train": part, "loss.kl": 1e-3})
    trainer = in_fp64(recipe, accelerator)
    trainer.objective.alignment.backbone.double()
    model = trainer.raw_autoencoder
    x = images().double() / 127.5 - 1

    out = model(x, noise=keyed_normal((4, 8, 8, 8), 0, 0, 0))
    image = (out.reconstruction - x).square().mean()
    alignment = trainer.objective.alignment_terms(out.latent, x).total
    last = model.encoder.conv_out.weight
    ratio = naive_ratio(image, alignment, last)
    (image + 0.1 * ratio * alignment + 1e-3 * out.posterior.kl().mean() / x[0].numel()).backward()
    expected = gradients(model, trainer.objective)

    scalars, *_ = trainer._autoencoder_backward(Part(x))
    assert_equal(gradients(model, trainer.objective), expected, rtol=1e-7)
    assert scalars["alignment/ratio"].item() == pytest.approx(ratio.item(), rel=1e-7)


def test_the_autoencoder_is_passed_through_once(small, accelerator):
    """A retained pass for each ratio would send a gradient through the layers again."""
    recipe = small(**ADVERSARIAL, **ALIGNED, **{"loss.adversarial.adaptive": True})
    trainer = Trainer(recipe, accelerator)
    passes = {"decoder": 0, "encoder": 0}
    for name, weight in (
        ("decoder", trainer.raw_autoencoder.decoder.conv_in.weight),
        ("encoder", trainer.raw_autoencoder.encoder.conv_in.weight),
    ):
        weight.register_hook(lambda gradient, name=name: passes.update({name: passes[name] + 1}))
    trainer.update([images()])
    assert passes == {"decoder": 1, "encoder": 1}


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {
            "loss.learn_logvar": True,
            "loss.perceptual.net": "efficientnet-lite0",
            "loss.perceptual.gram": 0.1,
            "loss.wavelet": 0.3,
        },
        {"loss.adversarial.r1": 1.0, "loss.adversarial.r2": 0.5, "loss.adversarial.penalty_every": 2},
        {"loss.adversarial.lecam": 0.1, "loss.adversarial.discriminator": "unet"},
        {"model.latent_noise": 3.0},
        {"loss.alignment.weight": 0.1, "loss.alignment.adaptive": False, "loss.alignment.backbone": "efficientnet-lite0"},
        {"loss.adversarial.discriminator": "features", "loss.adversarial.backbone": "efficientnet-lite0"},
    ],
    ids=["plain", "logvar", "r1", "lecam", "latent noise", "alignment", "features"],
)
def test_accumulation_equals_one_large_batch(extra, small, accelerator):
    options = {**ADVERSARIAL, "optimizer.max_grad_norm": 0, **extra}
    whole, cut = Trainer(small(**options), accelerator), Trainer(small(**options), accelerator)
    for _ in range(2):
        a = whole.update([images()])
        b = cut.update(list(images().split(2)))
    for part, state in whole.saved.items():
        for name, value in state.state_dict().items():
            torch.testing.assert_close(value, cut.saved[part].state_dict()[name], rtol=1e-3, atol=1e-4, msg=f"{part}.{name}")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=2e-3, atol=2e-4, msg=name)


def test_the_losses_own_parameters_are_optimized(small, accelerator):
    recipe = small(**ALIGNED, **{"loss.learn_logvar": True})
    trainer = Trainer(recipe, accelerator)
    before = {name: p.clone() for name, p in trainer.objective.named_parameters()}
    assert len(before) >= 2  # the log-variance and the projection
    trainer.update([images()])
    for name, p in trainer.objective.named_parameters():
        assert not torch.equal(p, before[name]), name


def test_r1_equals_the_naive_formula_and_comes_lazily(small, accelerator):
    options = {"loss.adversarial.r1": 2.0, "loss.adversarial.r2": 0.6, "loss.adversarial.penalty_every": 4}
    trainer = in_fp64(small(**ADVERSARIAL, **options), accelerator)
    judge = trainer.raw_discriminator
    real, fake = images().double() / 127.5 - 1, images().double().flip(3) / 200 - 0.5
    trainer.adversary.backward(real, fake, 1, True, step=8)
    got = gradients(judge)

    loss = discriminator_loss("hinge", judge(real), judge(fake)).mean()
    for gamma, x in ((2.0, real.clone().requires_grad_()), (0.6, fake.clone().requires_grad_())):
        (g,) = torch.autograd.grad(sum(m.sum() for m in judge(x)), x, create_graph=True)
        loss = loss + 4 * gamma / 2 * g.square().sum() / len(x)  # Mescheder et al. 2018, eq. 9, as often as every fourth step
    loss.backward()
    assert_equal(got, gradients(judge))
    assert "loss/r1" not in trainer.adversary.backward(real, fake, 1, True, step=9)


def test_the_discriminator_rests_until_its_start(small, accelerator):
    trainer = Trainer(small(**ADVERSARIAL, **{"loss.adversarial.start_images": 8}), accelerator)
    start = [p.clone() for p in trainer.raw_discriminator.parameters()]
    for _ in range(2):
        terms = trainer.update([images()])
        assert "loss/discriminator" not in terms
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.raw_discriminator.parameters(), strict=True))
    assert "loss/discriminator" in trainer.update([images()])
    assert not all(torch.equal(a, b) for a, b in zip(start, trainer.raw_discriminator.parameters(), strict=True))


@pytest.mark.parametrize("part", ["decoder", "decoder-head"])
def test_training_the_decoder_leaves_the_latent_bitwise(part, small, accelerator):
    trainer = Trainer(
        small(**ADVERSARIAL, **{"model.train": part, "optimizer.lr": 1e-2, "optimizer.weight_decay": 0.1}), accelerator
    )
    x = images().float() / 127.5 - 1
    before, picture = trainer.raw_autoencoder.encode(x), trainer.raw_autoencoder(x, sample_posterior=False).reconstruction
    for _ in range(3):
        trainer.update([images()])
    after = trainer.raw_autoencoder.encode(x)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.logvar, after.logvar)
    assert not torch.allclose(picture, trainer.raw_autoencoder(x, sample_posterior=False).reconstruction)
    for name, value in trainer.raw_autoencoder.named_parameters():
        if not value.requires_grad:
            assert torch.equal(trainer.ema.weights[name], value), name


def test_latent_noise_is_what_the_decoder_gets(small, accelerator):
    trainer = in_fp64(small(**{"model.latent_noise": 3.0}), accelerator)
    x = images().double() / 127.5 - 1
    transform = trainer.corruption.latent_path((8, 8, 8), trainer._draws(Part(x))).latent
    assert transform is not None
    z = torch.ones(4, 8, 8, 8, dtype=torch.float64)
    noise, share = keyed_normal((4, 8, 8, 8), 0, 0, 0, "latent noise"), keyed_uniform(4, 0, 0, 0, "latent noise share")
    t = share.view(4, 1, 1, 1).double()
    torch.testing.assert_close(transform(z), (1 - t) * z + t * 3 * noise.double())
    other = keyed_normal((4, 8, 8, 8), 0, 0, 0)
    assert not torch.allclose(noise, other), "not the noise of the posterior again"


def run_naive(trainer: Trainer, x: torch.Tensor):
    """What the step is given: corrupted images, the latent's path and the noise of the posterior."""
    part = Part(x)
    given = trainer.corruption.images(x, trainer._draws(part), 0)
    return given, trainer.corruption.latent_path((8, 8, 8), trainer._draws(part)), trainer._noise(part)


def test_the_loss_is_against_the_clean_image_and_the_fill_learns(small, accelerator):
    options = {
        "corruption.noise": [0.1, 0.5],
        "corruption.blur": [0.5, 2.0],
        "corruption.mask": [0.3, 0.6],
        "corruption.mask_patch": 5,
    }
    for where in ("all", "hidden"):
        trainer = in_fp64(small(**options, **{"corruption.mask_loss": where, "loss.l2": 1.0, "loss.l1": 0.5}), accelerator)
        trainer.corruption.double()
        model, x = trainer.raw_autoencoder, images().double() / 127.5 - 1
        given, _, noise = run_naive(trainer, x)
        assert not torch.equal(given.images, x)
        out = model(given.images, noise=noise)
        d = out.reconstruction - x
        if where == "hidden":
            hidden = given.hidden
            assert set(hidden.unique().tolist()) == {0.0, 1.0}
            per_image = lambda v, h=hidden: (v * h).sum((1, 2, 3)) / (3 * h.sum((1, 2, 3)))  # noqa: E731
            naive = 0.5 * per_image(d.abs()).mean() + per_image(d.square()).mean()
        else:
            naive = 0.5 * d.abs().mean() + d.square().mean()
        naive = naive + trainer.recipe.loss.kl * out.posterior.kl().mean() / x[0].numel()
        naive.backward()
        expected = gradients(model, trainer.corruption)
        assert expected["1.fill"].any()
        trainer._autoencoder_backward(Part(x))
        assert_equal(gradients(model, trainer.corruption), expected)


def test_equivariance_compares_with_the_transformed_image_in_both_networks(small, accelerator):
    options = {"loss.equivariance.probability": 1.0, "loss.equivariance.smallest_scale": 0.5, "loss.l2": 1.0}
    trainer = in_fp64(small(**ADVERSARIAL, **options), accelerator)
    model, x = trainer.raw_autoencoder, images().double() / 127.5 - 1
    trainer.state.step = next(step for step in range(20) if _scale(trainer, x, step) < 32)
    _, path, noise = run_naive(trainer, x)
    out = model(x, noise=noise, latent_transform=path.latent)
    target = path.target(x)
    assert out.reconstruction.shape == target.shape != x.shape
    naive = (out.reconstruction - target).square().mean() + trainer.recipe.loss.kl * out.posterior.kl().mean() / x[0].numel()
    naive = naive + 0.3 * generator_loss("hinge", trainer.raw_discriminator(out.reconstruction)).mean()
    naive.backward()
    trainer.raw_discriminator.zero_grad()
    expected = gradients(model)
    _, real, fake = trainer._autoencoder_backward(Part(x, adversarial=True))
    assert_equal(gradients(model), expected)
    torch.testing.assert_close(real, target)
    assert fake.shape == target.shape


def _scale(trainer: Trainer, x: torch.Tensor, step: int) -> int:
    trainer.state.step = step
    return run_naive(trainer, x)[1].target(x).shape[-1]


def test_a_smaller_latent_is_decoded_in_the_same_pass(small, accelerator):
    options = {"loss.equivariance.downscaled": 0.25, "loss.equivariance.factors": [2], "loss.l2": 1.0, "loss.learn_logvar": True}
    trainer = in_fp64(small(**options), accelerator)
    model, x = trainer.raw_autoencoder, images().double() / 127.5 - 1
    _, path, noise = run_naive(trainer, x)
    out = model(x, noise=noise, also_decode=path.smaller)
    s = trainer.objective.logvar
    terms = [(out.reconstruction - x).square().mean(), 0.25 * (out.also - path.smaller_target(x)).square().mean()]
    naive = sum(terms) / s.exp() + 1.25 * s + trainer.recipe.loss.kl * out.posterior.kl().mean() / x[0].numel()
    naive.backward()
    expected = gradients(model, trainer.objective)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    scalars, *_ = trainer._autoencoder_backward(Part(x))
    assert_equal(gradients(model, trainer.objective), expected)
    assert len(calls) == 1
    assert scalars["loss/total"].item() == pytest.approx(naive.item(), rel=1e-10)


def test_penalties_on_the_latent_equal_the_naive_formulas(small, accelerator):
    options = {
        "loss.l2": 1.0,
        "loss.sparsity.weight": 0.3,
        "loss.sparsity.kind": "kl",
        "loss.contractive.weight": 0.2,
        "loss.contractive.probes": 2,
        "loss.spectrum": 0.1,
        "loss.free_bits": 0.02,
        "loss.kl": 1e-3,
    }
    trainer = in_fp64(small(**options), accelerator)
    model, x = trainer.raw_autoencoder, images().double() / 127.5 - 1
    part = Part(x)
    noise, probes = trainer._noise(part), trainer._probes(part, trainer._draws(part)).double()
    x.requires_grad_()
    with twice_differentiable():
        out = model(x, noise=noise)
    energy = 0.0
    for probe in probes:
        (pulled,) = torch.autograd.grad((out.posterior.mean * probe).sum(), x, create_graph=True)
        energy = energy + pulled.square().sum() / len(probes) / 4
    rho = out.posterior.mean.sigmoid().mean((0, 2, 3))
    sparse = (0.05 * torch.log(0.05 / rho) + 0.95 * torch.log(0.95 / (1 - rho))).mean()
    kl = 0.5 * (out.posterior.mean.square() + out.posterior.logvar.exp() - 1 - out.posterior.logvar).sum((2, 3)).mean(0)
    naive = (out.reconstruction - x.detach()).square().mean() + 0.3 * sparse + 0.2 * energy / x[0].numel()
    naive = naive + 1e-3 * kl.clamp_min(0.02 * 64).sum() / x[0].numel() + 0.1 * spectrum_matching(out.latent, x.detach()).mean()
    naive.backward()
    expected = gradients(model)
    scalars, *_ = trainer._autoencoder_backward(Part(x.detach()))
    assert_equal(gradients(model), expected, rtol=1e-8)
    assert scalars["loss/total"].item() == pytest.approx(naive.item(), rel=1e-9)
    assert 0 <= scalars["loss/active"].item() <= 1


def test_a_plain_code_is_not_sampled_and_its_variance_stays(small, accelerator):
    trainer = Trainer(small(**{"model.bottleneck": "deterministic", "loss.kl": 0.0, "model.initial_logvar": 0.0}), accelerator)
    assert trainer.recipe.loss.kl == 0
    for _ in range(3):
        trainer.update([images()])
    posterior = trainer.raw_autoencoder.encode(images().float() / 127.5 - 1)
    assert (posterior.logvar == -30).all()
    torch.testing.assert_close(posterior.sample(), posterior.mode(), rtol=0, atol=1e-5)


def test_a_reported_step_has_the_norm_of_every_term_and_the_same_weights(small, accelerator):
    options = {**ADVERSARIAL, "loss.adversarial.adaptive": True, "loss.l1": 1.0, "loss.perceptual.net": "efficientnet-lite0"}
    plain, told = Trainer(small(**options), accelerator), Trainer(small(**options), accelerator)
    a, b = plain.update([images()]), told.update([images()], report=True)
    names = {"l1", "l2", "perceptual", "kl", "adversarial", "autoencoder", "discriminator"}
    assert {name.removeprefix("gradient_norm/") for name in b if name.startswith("gradient_norm/")} == names
    assert {n for n in a if n.startswith("gradient_norm/")} == {"gradient_norm/autoencoder", "gradient_norm/discriminator"}
    assert b["gradient_norm/l1"].item() == pytest.approx(1 / math.sqrt(4 * 3 * 32 * 32), rel=1e-5)
    for p, q in zip(plain.raw_autoencoder.parameters(), told.raw_autoencoder.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_that_is_not_finite_is_left_out(small, accelerator):
    trainer = Trainer(small(**ADVERSARIAL, **{"loss.adversarial.lecam": 0.1}), accelerator)
    trainer.update([images()])
    before = {k: v.clone() for part in trainer.saved.values() for k, v in part.state_dict().items()}
    healthy = trainer.objective.image_terms

    def poisoned(x, target, where=None):
        return healthy(x * float("nan"), target)

    trainer.objective.image_terms = poisoned
    trainer.update([images()])
    trainer.update([images()])
    state = trainer.state
    assert (state.step, state.images_seen, state.skipped, state.skipped_in_a_row) == (3, 12, 2, 2)
    after = {k: v for part in trainer.saved.values() for k, v in part.state_dict().items()}
    assert [k for k in before if not torch.equal(before[k], after[k])] == []
    trainer.objective.image_terms = healthy
    trainer.update([images()])
    assert (trainer.state.skipped, trainer.state.skipped_in_a_row) == (2, 0)


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
