"""The training step equals the naive formulas: one loss, one graph, retained passes."""

from __future__ import annotations

import math

import pytest
import torch

from latentae.data.transforms import to_float
from latentae.keyed import keyed_normal, keyed_uniform
from latentae.losses.adversarial import discriminator_loss, generator_loss, twice_differentiable
from latentae.losses.spectrum import spectrum_matching
from latentae.training import steps
from latentae.training.corruption import Draws
from latentae.training.steps import Trainer

ADVERSARIAL = {"loss.adversarial.weight": 0.3, "loss.adversarial.channels": 8, "loss.adversarial.layers": 2}
ALIGNED = {"loss.alignment.weight": 0.1, "loss.alignment.backbone": "efficientnet-lite0"}


def images(count: int = 4) -> torch.Tensor:
    """Smooth pictures: noise can't be compressed, so nothing could be learned from it."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return (torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bilinear") * 255).to(torch.uint8)


@pytest.fixture
def in_fp64(small, accelerator, monkeypatch):
    """A trainer whose networks, losses and images are fp64, and whose gradients are not clipped."""

    def make(**options) -> Trainer:
        trainer = Trainer(small(**{"optimizer.max_grad_norm": 0, **options}), accelerator)
        for module in modules(trainer).values():
            module.double()
        return trainer

    monkeypatch.setattr(steps, "to_float", lambda batch: to_float(batch).double())
    return make


X = to_float(images()).double()
NOISE = keyed_normal((4, 8, 8, 8), 0, 0, 0)  # of the posterior, in the first step


def modules(trainer: Trainer) -> dict[str, torch.nn.Module]:
    found = {
        "autoencoder": trainer.raw_autoencoder,
        "objective": trainer.objective,
        "corruption": trainer.corruption,
    }
    return (
        found if trainer.raw_discriminator is None else {**found, "discriminator": trainer.raw_discriminator}
    )


def parameters(trainer: Trainer) -> dict[str, torch.nn.Parameter]:
    return {
        f"{part}.{name}": p
        for part, module in modules(trainer).items()
        for name, p in module.named_parameters()
    }


def naive_gradients(
    trainer: Trainer, loss: torch.Tensor, judged: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Gradients of the autoencoder's loss and of the discriminator's, each for its network."""
    found = {}
    for total, of_judge in ((loss, False), (judged, True)):
        named = {
            n: p
            for n, p in parameters(trainer).items()
            if n.startswith("discriminator") == of_judge and p.requires_grad
        }
        if total is not None:
            gradients = torch.autograd.grad(total, [*named.values()], allow_unused=True, retain_graph=True)
            found |= {name: g for name, g in zip(named, gradients, strict=True) if g is not None}
    return found


def update(trainer: Trainer) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One step; its terms, and the gradients that the optimizers were given."""
    given: dict[str, torch.Tensor] = {}
    names = {id(p): name for name, p in parameters(trainer).items()}

    def note(optimizer, *_) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        given.update({names[id(p)]: p.grad.clone() for p in trained})

    hooks = [getattr(o, "optimizer", o).register_step_pre_hook(note) for o in trainer.optimizers.values()]
    terms = trainer.update([images()])
    for hook in hooks:
        hook.remove()
    return terms, given


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-9) -> None:
    assert got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(
            value, expected[name], rtol=rtol, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(
    ("kind", "network"), [("hinge", "unet"), ("vanilla", "patch"), ("non-saturating", "unet")]
)
def test_constant_weights_equal_the_naive_formula(kind, network, in_fp64):
    weights = {"loss.l1": 1.0, "loss.l2": 0.7, "loss.kl": 1e-3}
    game = {**ADVERSARIAL, "loss.adversarial.loss": kind, "loss.adversarial.discriminator": network}
    trainer = in_fp64(**game, **weights)
    model, judge = trainer.raw_autoencoder, trainer.raw_discriminator
    out = model(X, noise=NOISE)
    difference = out.reconstruction - X
    naive = difference.abs().mean() + 0.7 * difference.square().mean()
    naive = naive + 0.3 * generator_loss(kind, judge(out.reconstruction)).mean()
    naive = naive + 1e-3 * out.posterior.kl().mean() / X[0].numel()
    judged = discriminator_loss(kind, judge(X), judge(out.reconstruction.detach())).mean()
    expected = naive_gradients(trainer, naive, judged)
    terms, got = update(trainer)
    assert_equal(got, expected)
    assert terms["loss/total"].item() == pytest.approx(naive.item(), rel=1e-10)
    assert terms["loss/discriminator"].item() == pytest.approx(judged.item(), rel=1e-10)


def naive_ratio(reference, other, weight, limit=math.inf):
    """VQGAN's eq. 7 as LDM's code has it: two retained backward passes."""
    a = torch.autograd.grad(reference, weight, retain_graph=True)[0]
    b = torch.autograd.grad(other, weight, retain_graph=True)[0]
    return (a.norm() / (b.norm() + 1e-4)).clamp(0, limit).detach()


@pytest.mark.parametrize(("limit", "learned"), [(1e4, True), (0.05, False)])
def test_the_adaptive_weight_equals_the_naive_formula(limit, learned, in_fp64):
    adaptive = {"loss.adversarial.adaptive": True, "loss.adversarial.max_ratio": limit}
    weights = {
        "loss.kl": 1e-3,
        "loss.l1": 1.0,
        "loss.l2": 0.0,
        "loss.learn_logvar": learned,
        "loss.initial_logvar": 0.4,
    }
    trainer = in_fp64(**ADVERSARIAL, **adaptive, **weights)
    model, judge = trainer.raw_autoencoder, trainer.raw_discriminator
    s = trainer.objective.logvar if learned else torch.tensor(0.4, dtype=torch.float64)
    out = model(X, noise=NOISE)
    # LDM's contperceptual, per element: the reconstruction likelihood, the generator's term and the
    # KL
    likelihood = (out.reconstruction - X).abs().mean() / torch.exp(s) + (s if learned else 0)
    game = -torch.stack([logits.mean() for logits in judge(out.reconstruction)]).mean()
    ratio = naive_ratio(likelihood, game, model.decoder.conv_out.weight, limit)
    naive = likelihood + 0.3 * ratio * game + 1e-3 * out.posterior.kl().mean() / X[0].numel()
    judged = discriminator_loss("hinge", judge(X), judge(out.reconstruction.detach())).mean()
    expected = naive_gradients(trainer, naive, judged)
    terms, got = update(trainer)
    assert_equal(got, expected)
    assert terms["adversarial/ratio"].item() == pytest.approx(ratio.item(), rel=1e-9)


@pytest.mark.parametrize("part", ["all", "latent"])
def test_the_alignment_equals_the_naive_formula(part, in_fp64):
    trainer = in_fp64(**ALIGNED, **{"model.train": part, "loss.kl": 1e-3})
    model = trainer.raw_autoencoder
    out = model(X, noise=NOISE)
    image = (out.reconstruction - X).square().mean()
    alignment = trainer.objective.alignment(out.latent, X).mean()
    ratio = naive_ratio(image, alignment, model.encoder.conv_out.weight)
    expected = naive_gradients(
        trainer, image + 0.1 * ratio * alignment + 1e-3 * out.posterior.kl().mean() / X[0].numel()
    )
    terms, got = update(trainer)
    assert_equal(got, expected, rtol=1e-7)
    assert terms["alignment/ratio"].item() == pytest.approx(ratio.item(), rel=1e-7)


def test_the_autoencoder_is_passed_through_once(small, accelerator):
    """A retained pass for each ratio would send a gradient through the layers again."""
    trainer = Trainer(small(**ADVERSARIAL, **ALIGNED, **{"loss.adversarial.adaptive": True}), accelerator)
    passes = {"decoder": 0, "encoder": 0}
    for name, weight in (
        ("decoder", trainer.raw_autoencoder.decoder.conv_in.weight),
        ("encoder", trainer.raw_autoencoder.encoder.conv_in.weight),
    ):
        weight.register_hook(lambda _, name=name: passes.update({name: passes[name] + 1}))
    trainer.update([images()])
    assert passes == {"decoder": 1, "encoder": 1}


def test_r1_equals_the_naive_formula_and_comes_lazily(in_fp64):
    options = {"loss.adversarial.r1": 2.0, "loss.adversarial.r2": 0.6, "loss.adversarial.penalty_every": 4}
    trainer = in_fp64(**ADVERSARIAL, **options)
    judge = trainer.raw_discriminator
    real, fake = X, images().double().flip(3) / 200 - 0.5
    trainer.adversary.backward(real, fake, 1, True, step=8)
    got = {f"discriminator.{name}": p.grad.clone() for name, p in judge.named_parameters()}
    loss = discriminator_loss("hinge", judge(real), judge(fake)).mean()
    for gamma, x in ((2.0, real.clone().requires_grad_()), (0.6, fake.clone().requires_grad_())):
        (g,) = torch.autograd.grad(sum(m.sum() for m in judge(x)), x, create_graph=True)
        loss = loss + 4 * gamma / 2 * g.square().sum() / len(
            x
        )  # Mescheder et al. 2018, eq. 9, as often as every fourth step
    assert_equal(got, naive_gradients(trainer, loss.new_zeros((), requires_grad=True), loss))
    assert "loss/r1" not in trainer.adversary.backward(real, fake, 1, True, step=9)


def test_the_discriminator_rests_until_its_start(small, accelerator):
    trainer = Trainer(small(**ADVERSARIAL, **{"loss.adversarial.start_images": 8}), accelerator)
    start = [p.clone() for p in trainer.raw_discriminator.parameters()]
    for _ in range(2):
        terms = trainer.update([images()])
        assert "loss/discriminator" not in terms
    assert all(torch.equal(a, b) for a, b in zip(start, trainer.raw_discriminator.parameters(), strict=True))
    assert "loss/discriminator" in trainer.update([images()])
    assert not all(
        torch.equal(a, b) for a, b in zip(start, trainer.raw_discriminator.parameters(), strict=True)
    )


@pytest.mark.parametrize("part", ["decoder", "decoder-head"])
def test_training_the_decoder_leaves_the_latent_bitwise(part, small, accelerator):
    trainer = Trainer(
        small(**ADVERSARIAL, **{"model.train": part, "optimizer.lr": 1e-2, "optimizer.weight_decay": 0.1}),
        accelerator,
    )
    x = images().float() / 127.5 - 1
    before, picture = (
        trainer.raw_autoencoder.encode(x),
        trainer.raw_autoencoder(x, sample_posterior=False).reconstruction,
    )
    for _ in range(3):
        trainer.update([images()])
    after = trainer.raw_autoencoder.encode(x)
    assert torch.equal(before.mean, after.mean)
    assert torch.equal(before.logvar, after.logvar)
    assert not torch.allclose(picture, trainer.raw_autoencoder(x, sample_posterior=False).reconstruction)
    for name, value in trainer.raw_autoencoder.named_parameters():
        if not value.requires_grad:
            assert torch.equal(trainer.ema.weights[name], value), name


def draws(step: int = 0) -> Draws:
    """The numbers of a batch in one part."""
    return Draws(0, step, 0, 4, torch.device("cpu"))


def test_latent_noise_is_what_the_decoder_gets(in_fp64):
    trainer = in_fp64(**{"model.latent_noise": 3.0})
    transform = trainer.corruption.latent_path((8, 8, 8), draws()).latent
    assert transform is not None
    z = torch.ones(4, 8, 8, 8, dtype=torch.float64)
    noise, share = (
        keyed_normal((4, 8, 8, 8), 0, 0, 0, "latent noise"),
        keyed_uniform(4, 0, 0, 0, "latent noise share"),
    )
    t = share.view(4, 1, 1, 1).double()
    torch.testing.assert_close(transform(z), (1 - t) * z + t * 3 * noise.double())
    assert not torch.allclose(noise, NOISE), "not the noise of the posterior again"


@pytest.mark.parametrize("where", ["all", "hidden"])
def test_the_loss_is_against_the_clean_image_and_the_fill_learns(where, in_fp64):
    options = {"corruption.noise": [0.1, 0.5], "corruption.blur": [0.5, 2.0], "corruption.mask": [0.3, 0.6]}
    options |= {"corruption.mask_patch": 5, "corruption.mask_loss": where, "loss.l2": 1.0, "loss.l1": 0.5}
    trainer = in_fp64(**options)
    given, hidden = trainer.corruption.images(X, draws(), 0)
    assert not torch.equal(given, X)
    out = trainer.raw_autoencoder(given, noise=NOISE)
    d = out.reconstruction - X
    if where == "hidden":
        assert set(hidden.unique().tolist()) == {0.0, 1.0}
        per_image = lambda v: (v * hidden).sum((1, 2, 3)) / (3 * hidden.sum((1, 2, 3)))  # noqa: E731
        naive = 0.5 * per_image(d.abs()).mean() + per_image(d.square()).mean()
    else:
        naive = 0.5 * d.abs().mean() + d.square().mean()
    naive = naive + trainer.recipe.loss.kl * out.posterior.kl().mean() / X[0].numel()
    expected = naive_gradients(trainer, naive)
    assert expected["corruption.fill"].any()
    assert_equal(update(trainer)[1], expected)


def test_equivariance_compares_with_the_transformed_image_in_both_networks(in_fp64):
    options = {"loss.equivariance.probability": 1.0, "loss.equivariance.smallest_scale": 0.5, "loss.l2": 1.0}
    trainer = in_fp64(**ADVERSARIAL, **options)
    model, judge = trainer.raw_autoencoder, trainer.raw_discriminator
    paths = (trainer.corruption.latent_path((8, 8, 8), draws(step)) for step in range(20))
    step, path = next((step, path) for step, path in enumerate(paths) if path.target(X).shape[-1] < 32)
    trainer.state.step = step
    out = model(X, noise=keyed_normal((4, 8, 8, 8), 0, step, 0), latent_transform=path.latent)
    target = path.target(X)
    assert out.reconstruction.shape == target.shape
    naive = (
        out.reconstruction - target
    ).square().mean() + trainer.recipe.loss.kl * out.posterior.kl().mean() / X[0].numel()
    naive = naive + 0.3 * generator_loss("hinge", judge(out.reconstruction)).mean()
    judged = discriminator_loss("hinge", judge(target), judge(out.reconstruction.detach())).mean()
    expected = naive_gradients(trainer, naive, judged)
    assert_equal(update(trainer)[1], expected)


def test_the_hidden_patches_are_transformed_with_the_image(in_fp64):
    options = {
        "corruption.mask": [0.5, 0.5],
        "corruption.mask_loss": "hidden",
        "loss.l1": 0.0,
        "loss.l2": 1.0,
    }
    options |= {"loss.equivariance.probability": 1.0, "loss.equivariance.smallest_scale": 0.5}
    trainer = in_fp64(**options)
    for step in range(4):  # of several sizes
        trainer.state.step = step
        given, hidden = trainer.corruption.images(X, draws(step), 0)
        path = trainer.corruption.latent_path((8, 8, 8), draws(step))
        noise = keyed_normal((4, 8, 8, 8), 0, step, 0)
        d = trainer.raw_autoencoder(
            given, noise=noise, latent_transform=path.latent
        ).reconstruction - path.target(X)
        where = path.target(hidden).round()
        expected = ((d.square() * where).sum((1, 2, 3)) / (3 * where.sum((1, 2, 3)))).mean()
        terms, _ = update(trainer)
        assert terms["loss/l2"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_smaller_latent_is_decoded_in_the_same_pass(in_fp64):
    options = {
        "loss.equivariance.downscaled": 0.25,
        "loss.equivariance.factors": [2],
        "loss.l2": 1.0,
        "loss.learn_logvar": True,
    }
    trainer = in_fp64(**options)
    model, s = trainer.raw_autoencoder, trainer.objective.logvar
    path = trainer.corruption.latent_path((8, 8, 8), draws())
    out = model(X, noise=NOISE, also_decode=path.smaller)
    losses = [
        (out.reconstruction - X).square().mean(),
        0.25 * (out.also - path.smaller_target(X)).square().mean(),
    ]
    naive = (
        sum(losses) / s.exp() + 1.25 * s + trainer.recipe.loss.kl * out.posterior.kl().mean() / X[0].numel()
    )
    expected = naive_gradients(trainer, naive)
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    terms, got = update(trainer)
    assert_equal(got, expected)
    assert len(calls) == 1
    assert terms["loss/total"].item() == pytest.approx(naive.item(), rel=1e-10)


def test_penalties_on_the_latent_equal_the_naive_formulas(in_fp64):
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
    trainer = in_fp64(**options)
    x = X.clone().requires_grad_()
    with twice_differentiable():
        out = trainer.raw_autoencoder(x, noise=NOISE)
    energy = 0.0
    for probe in draws().normal((2, 8, 8, 8), "contractive").transpose(0, 1).double():
        (pulled,) = torch.autograd.grad((out.posterior.mean * probe).sum(), x, create_graph=True)
        energy = energy + pulled.square().sum() / 2 / 4
    rho = out.posterior.mean.sigmoid().mean((0, 2, 3))
    sparse = (0.05 * torch.log(0.05 / rho) + 0.95 * torch.log(0.95 / (1 - rho))).mean()
    kl = 0.5 * (out.posterior.mean.square() + out.posterior.logvar.exp() - 1 - out.posterior.logvar).sum(
        (2, 3)
    ).mean(0)
    naive = (out.reconstruction - X).square().mean() + 0.3 * sparse + 0.2 * energy / X[0].numel()
    naive = (
        naive
        + 1e-3 * kl.clamp_min(0.02 * 64).sum() / X[0].numel()
        + 0.1 * spectrum_matching(out.latent, X).mean()
    )
    expected = naive_gradients(trainer, naive)
    terms, got = update(trainer)
    assert_equal(got, expected, rtol=1e-8)
    assert terms["loss/total"].item() == pytest.approx(naive.item(), rel=1e-9)
    assert 0 <= terms["loss/active"].item() <= 1


def test_a_plain_code_is_not_sampled_and_its_variance_stays(small, accelerator):
    trainer = Trainer(
        small(**{"model.bottleneck": "deterministic", "loss.kl": 0.0, "model.initial_logvar": 0.0}),
        accelerator,
    )
    for _ in range(3):
        trainer.update([images()])
    posterior = trainer.raw_autoencoder.encode(images().float() / 127.5 - 1)
    assert (posterior.logvar == -30).all()
    torch.testing.assert_close(posterior.sample(), posterior.mode(), rtol=0, atol=1e-5)


def test_a_reported_step_has_the_norm_of_every_term_and_the_same_weights(small, accelerator):
    options = {
        **ADVERSARIAL,
        "loss.adversarial.adaptive": True,
        "loss.l1": 1.0,
        "loss.perceptual.net": "efficientnet-lite0",
    }
    plain, told = Trainer(small(**options), accelerator), Trainer(small(**options), accelerator)
    a, b = plain.update([images()]), told.update([images()], report=True)
    names = {"l1", "l2", "perceptual", "kl", "adversarial", "autoencoder", "discriminator"}
    assert {name.removeprefix("gradient_norm/") for name in b if name.startswith("gradient_norm/")} == names
    assert {n for n in a if n.startswith("gradient_norm/")} == {
        "gradient_norm/autoencoder",
        "gradient_norm/discriminator",
    }
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
    losses = [trainer.update([images()])["loss/total"].item() for _ in range(40)]
    assert losses[-1] < 0.7 * losses[0]
    name, weight = next(iter(trainer.raw_autoencoder.named_parameters()))
    assert not torch.equal(trainer.ema.weights[name], weight)
    assert trainer.state.images_seen == 160


def test_the_same_seed_gives_the_same_weights_and_the_recipe_the_first_variance(small, accelerator):
    a, b, c = (Trainer(small(seed=seed, **{"model.initial_logvar": -6}), accelerator) for seed in (0, 0, 1))
    logvar = a.raw_autoencoder.encode(images().float() / 127.5 - 1).logvar
    assert -7 < logvar.mean().item() < -5
    for trainer in (a, b, c):
        trainer.update([images()])
    first = [next(iter(t.raw_autoencoder.parameters())) for t in (a, b, c)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
