"""Every recipe of the family beats the plain network on the property of its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from latentae.data.builtin import digits
from latentae.data.transforms import to_float
from latentae.models.base import DiagonalGaussian
from latentae.models.linear import LinearAutoencoder
from latentae.models.pca import fit_pca, principal_angles
from latentae.training.launch import build_accelerator, close_accelerator
from latentae.training.recipe import load_recipe
from latentae.training.steps import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from family_measures import channel_kl, error, hide, jacobian, movement, nearest, sampled, units_needed

pytest.importorskip("sklearn")
CHANNELS = 32  # for all, so that one plain model serves every comparison
STEPS = 250


def trained(name, steps=STEPS, **overrides):
    """The recipe's model after `steps` steps on random batches of the training digits."""
    recipe = load_recipe(load_recipe(name, overrides), {"precision": "fp32"})
    recipe = load_recipe(recipe, {"images": steps * recipe.batch_size})
    images, _ = digits(binary="binary" in recipe.data.shards)
    order = torch.Generator().manual_seed(0)
    accelerator = build_accelerator("fp32")
    trainer = Trainer(recipe, accelerator)
    for _ in range(steps):
        trainer.update([images[torch.randint(len(images), (recipe.batch_size,), generator=order)]])
    close_accelerator(accelerator)
    assert trainer.state.skipped == 0
    model = trainer.raw_autoencoder.eval().requires_grad_(False)
    model.load_state_dict(trainer.ema.state_dict())  # as whoever loads a run gets it
    return model


@pytest.fixture(scope="module")
def held_out():
    return to_float(digits("held-out")[0])


@pytest.fixture(scope="module")
def noise(held_out):
    return torch.randn(held_out.shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plain():
    return trained("undercomplete-digits", **{"model.latent_channels": CHANNELS})


@pytest.mark.slow
def test_a_narrow_network_beats_pca_at_the_same_number_of_floats(held_out):
    model = trained("undercomplete-digits", 300)
    channels = model.config.latent_channels
    exact = LinearAutoencoder(
        load_recipe("linear-digits", {"model.latent_channels": channels}).autoencoder_config()
    )
    exact.load_pca(fit_pca([digits()[0]], 8, channels))
    assert error(model, held_out) < error(exact, held_out)
    assert model.encode(held_out).logvar.eq(-30).all()


@pytest.mark.slow
def test_denoising_beats_the_plain_model_on_noisy_images(plain, held_out, noise):
    model = trained("denoising-digits", **{"model.latent_channels": CHANNELS})
    for std, share in ((0.6, 1.0), (0.8, 0.9)):
        noisy = held_out + std * noise
        assert error(model, noisy, held_out) < share * error(plain, noisy, held_out)
        assert error(model, noisy, held_out) < 0.4 * (noisy - held_out).square().mean(), (
            "most of the noise is gone"
        )


@pytest.mark.slow
def test_masked_fills_holes_better(plain, held_out):
    model = trained("masked-digits", **{"model.latent_channels": CHANNELS})
    given, where = hide(held_out, 2, 0.375, torch.Generator().manual_seed(2))
    assert error(model, given, held_out, where) < 0.8 * error(plain, given, held_out, where)


@pytest.mark.slow
def test_sparse_needs_fewer_units_for_the_same_error(plain, held_out):
    model = trained("sparse-digits", **{"model.latent_channels": CHANNELS})
    wanted = 1.5 * error(plain, held_out)
    assert error(model, held_out) < wanted, "the penalty does not cost the reconstruction"
    assert units_needed(model, held_out, wanted) < units_needed(plain, held_out, wanted)


@pytest.mark.slow
def test_contractive_has_a_smaller_jacobian_and_moves_less(plain, held_out, noise):
    model = trained("contractive-digits", **{"model.latent_channels": CHANNELS})
    (energy, relative), (plain_energy, plain_relative) = (jacobian(m, held_out[:64]) for m in (model, plain))
    assert energy < 0.2 * plain_energy
    assert relative < 0.85 * plain_relative, "also in units of the code's own spread"
    assert movement(model, held_out, 0.2 * noise) < 0.9 * movement(plain, held_out, 0.2 * noise)
    assert error(model, held_out) < 1.5 * error(plain, held_out)


@pytest.mark.slow
def test_the_prior_of_a_vae_gives_images_like_the_data_and_that_of_a_plain_model_does_not(plain, held_out):
    model = trained("vae-digits", 300)
    data = to_float(digits()[0])

    def samples(m):
        shape = (512, m.config.latent_channels, 1, 1)
        return sampled(m, torch.randn(shape, generator=torch.Generator().manual_seed(3)))

    own, plains, real = (nearest(images, data) for images in (samples(model), samples(plain), held_out))
    assert own < 0.75 * plains
    assert own < 1.5 * real, "as near to a training digit as a held-out digit is"
    assert samples(model).var(dim=0).sum() > 0.5 * data.var(dim=0).sum(), "and as different from each other"


def test_the_kl_of_a_vae_is_that_of_torch(held_out, accelerator):
    recipe = load_recipe("vae-digits", {"precision": "fp32"})
    trainer = Trainer(recipe, accelerator)
    images = digits()[0][:32]
    posterior: DiagonalGaussian = trainer.raw_autoencoder.encode(to_float(images))
    terms = trainer.update([images])
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(
        normal(posterior.mean.double(), posterior.std.double()),
        normal(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)),
    )
    assert terms["loss/kl"].item() == pytest.approx(expected.sum().item() / images.numel(), rel=1e-5)
    assert terms["loss/total"].item() == pytest.approx(
        (terms["loss/l2"] + recipe.loss.kl * terms["loss/kl"]).item(), rel=1e-5
    )
    torch.testing.assert_close(
        channel_kl(trainer.raw_autoencoder, held_out).sum(),
        trainer.raw_autoencoder.encode(held_out).kl().mean(),
    )


@pytest.mark.slow
def test_binary_digits_come_back():
    model = trained(load_recipe("binary-digits").phase_recipes()[0], 300)
    x = to_float(digits("held-out", binary=True)[0])
    shown = model.decode(model.encode(x).mean)
    always = (to_float(digits(binary=True)[0]).mean(dim=0) > 0) * 2.0 - 1.0
    assert ((shown > 0) != (x > 0)).float().mean() < 0.85 * (always.expand_as(x) != x).float().mean()


@pytest.mark.parametrize(("tied", "steps"), [(True, 800), pytest.param(False, 1500, marks=pytest.mark.slow)])
def test_a_linear_autoencoder_finds_pca(tied, steps):
    model = trained("linear-digits", steps, **{"model.tied": tied})
    images = digits()[0]
    pca = fit_pca([images], 8, model.config.latent_channels)
    exact = LinearAutoencoder(model.config)
    exact.load_pca(pca)
    assert error(model, to_float(images)) < 1.01 * error(exact, to_float(images))
    assert principal_angles(model.subspace(), pca.basis).max() < 4
