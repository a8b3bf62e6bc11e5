from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from latentae.losses.latent import kl_sparsity
from latentae.losses.objective import LossTerms, Objective
from latentae.losses.options import LossOptions
from latentae.losses.perceptual import gram_distance
from latentae.losses.reconstruction import charbonnier, l1, l2, wavelet
from latentae.losses.spectrum import spectrum_matching
from latentae.models.base import DiagonalGaussian

EVERYTHING = {
    "l1": 1.0,
    "wavelet": 0.1,
    "kl": 1e-6,
    "learn_logvar": True,
    "perceptual": {"net": "efficientnet-lite0", "weight": 1.0, "gram": 2.0},
    "classifier": {"weight": 0.1, "backbone": "efficientnet-lite0"},
    "adversarial": {
        "weight": 0.5,
        "adaptive": True,
        "max_ratio": 0.05,
        "loss": "vanilla",
        "r1": 10.0,
        "lecam": 0.01,
    },
    "alignment": {"weight": 0.1, "backbone": "efficientnet-lite0"},
}


def options(**values) -> LossOptions:
    return LossOptions(**{"l1": 0.0, "kl": 0.0, "perceptual": {"net": "none"}, **values})


def objective(**values) -> Objective:
    return Objective(options(**values), latent_channels=4)


def pair(size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(2, 3, size, size) * 2 - 1, torch.rand(2, 3, size, size) * 2 - 1


def test_total_is_the_weighted_sum_of_the_named_means():
    x, y = pair()
    weights = {"l1": 0.5, "l2": 2.0, "charbonnier": 0.1, "wavelet": 0.3}
    terms = objective(**weights).image_terms(x, y)
    assert set(terms.scalars) == set(terms.weighted) == set(weights)
    expected = {"l1": l1, "l2": l2, "charbonnier": charbonnier, "wavelet": wavelet}
    for name, weight in weights.items():
        torch.testing.assert_close(terms.scalars[name], expected[name](x, y).mean())
        torch.testing.assert_close(terms.weighted[name], weight * terms.scalars[name])
    torch.testing.assert_close(terms.total, sum(terms.weighted.values()))


def test_perceptual_and_gram_share_one_look_at_each_image(monkeypatch):
    x, y = pair(32)
    module = objective(perceptual={"net": "efficientnet-lite0", "weight": 0.5, "gram": 3.0})
    assert module.perceptual is not None
    expected = (
        module.perceptual(x, y).mean(),
        gram_distance(module.perceptual.features(x), module.perceptual.features(y)).mean(),
    )
    looked = []
    features = module.perceptual.features
    monkeypatch.setattr(module.perceptual, "features", lambda image: looked.append(image) or features(image))
    terms = module.image_terms(x, y)
    assert [image is known for image, known in zip(looked, (x, y), strict=True)] == [True, True]
    torch.testing.assert_close(terms.scalars["perceptual"], expected[0])
    torch.testing.assert_close(terms.scalars["gram"], expected[1])
    torch.testing.assert_close(terms.total, 0.5 * expected[0] + 3 * expected[1])


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"perceptual": {"net": "efficientnet-lite0", "weight": 1.0}}, {"perceptual"}),
        ({"perceptual": {"net": "efficientnet-lite0", "weight": 0.0, "gram": 1.0}}, {"gram"}),
        ({"classifier": {"weight": 0.1, "backbone": "efficientnet-lite0"}}, {"classifier"}),
        ({"wavelet": 1.0}, {"wavelet"}),
    ],
)
def test_every_image_terms_gradient_reaches_the_reconstruction(values, names):
    x, y = pair(32)
    terms = objective(**values).image_terms(x.requires_grad_(), y)
    assert set(terms.scalars) == names
    terms.total.backward()
    assert x.grad.abs().max() > 0


def test_a_learned_log_variance_is_ldms_per_element():
    x, y = (image.double() for image in pair())
    module = objective(l1=1.0, l2=0.5, learn_logvar=True, initial_logvar=0.3).double()
    assert module.logvar is not None
    terms = module.image_terms(x, y)
    s = module.logvar.detach().clone().requires_grad_()
    # contperceptual.py: sum over elements of rec / exp(s) + s, here divided by their number
    recon = (x - y).abs() + 0.5 * (x - y) ** 2
    expected = (recon / torch.exp(s) + s).sum() / recon.numel()
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=0)
    got, known = torch.autograd.grad(terms.total, module.logvar)[0], torch.autograd.grad(expected, s)[0]
    torch.testing.assert_close(got, known, rtol=1e-10, atol=0)
    assert terms.scalars["logvar"].item() == pytest.approx(0.3, abs=1e-6)
    torch.testing.assert_close(terms.scalars["l1"], (x - y).abs().mean())


def test_a_constant_log_variance_only_scales():
    x, y = pair()
    module = objective(l1=1.0, initial_logvar=math.log(4.0))
    assert not list(module.parameters())
    terms = module.image_terms(x, y)
    assert set(terms.weighted) == {"l1"}
    torch.testing.assert_close(terms.total, (x - y).abs().mean() / 4)
    torch.testing.assert_close(objective(l1=1.0).image_terms(x, y).total, (x - y).abs().mean())


@pytest.mark.parametrize("learned", [False, True])
def test_without_image_losses_there_still_is_a_graph(learned):
    x, y = pair()
    x.requires_grad_()
    terms = objective(learn_logvar=learned).image_terms(x, y)
    (gradient,) = torch.autograd.grad(terms.total, x)
    assert not gradient.any()
    assert set(terms.scalars) == ({"logvar"} if learned else set())


@pytest.mark.parametrize(
    ("values", "weighted"),
    [
        ({"kl": 1e-3}, {"kl": 1e-3}),
        ({"spectrum": 0.5}, {"spectrum": 0.5}),
        ({"sparsity": {"weight": 0.1, "kind": "l1"}, "kl": 1e-3}, {"kl": 1e-3, "sparsity": 0.1}),
        ({"sparsity": {"weight": 0.1, "kind": "kl", "target": 0.2}}, {"sparsity": 0.1}),
    ],
)
def test_weights_scale_the_latent_terms_only(values, weighted):
    images, mean = pair(32)[0], torch.randn(2, 4, 4, 4)
    posterior = DiagonalGaussian(torch.cat([mean, torch.randn_like(mean)], dim=1))
    terms = objective(**values).latent_terms(SimpleNamespace(posterior=posterior, latent=mean), images)
    expected = {
        "kl": posterior.kl().mean() / (3 * 32 * 32),
        "spectrum": spectrum_matching(mean, images).mean(),
        "sparsity": mean.abs().mean()
        if values.get("sparsity", {}).get("kind") == "l1"
        else kl_sparsity(mean.sigmoid().mean((0, 2, 3)), 0.2) / 4,
    }
    assert set(terms.weighted) == set(weighted)
    for name, weight in weighted.items():
        torch.testing.assert_close(terms.scalars[name], expected[name])
        torch.testing.assert_close(terms.weighted[name], weight * expected[name])
    torch.testing.assert_close(terms.scalars["kl"], expected["kl"])  # logged whether it is weighted or not
    assert ("active" in terms.scalars) == ("sparsity" in weighted)


def test_only_what_is_learned_is_a_parameter_or_saved():
    module, again = (Objective(LossOptions(**EVERYTHING), latent_channels=4).train() for _ in range(2))
    assert set(module.state_dict()) == {"logvar", "alignment.projection.weight"}
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(module.state_dict())
    assert not list(module.buffers()) or all("mean" in n or "std" in n for n, _ in module.named_buffers())
    with torch.no_grad():
        module.logvar.fill_(0.7)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.logvar, module.logvar)
    assert not any(m.training for m in module.perceptual.modules())
    module.double()
    assert next(module.perceptual.parameters()).dtype == torch.float64
    assert Objective(options(l1=1.0), 4).state_dict() == {}
    assert module.minimum_size == 32
    assert Objective(options(l1=1.0), 4).minimum_size == 1


def test_terms_add_up():
    a, b = torch.tensor(1.5, requires_grad=True), torch.tensor(2.0)
    assert LossTerms({"a": a}, {}).total is a
    assert LossTerms({"a": a, "b": b}, {}).total.item() == 3.5
    assert LossTerms({}, {"kl": b}).total.item() == 0.0
    assert LossTerms({"a": a}, {"kl": b}).merged(LossTerms({"b": b}, {"x": a})) == LossTerms(
        {"a": a, "b": b}, {"kl": b, "x": a}
    )


def test_losses_on_a_part_are_means_over_it():
    x, y = pair(32)
    where = torch.zeros(len(x), 1, 32, 32)
    where[0, :, :8, 4:20] = 1.0  # of the first image only
    terms = objective(l1=1.0, l2=1.0).image_terms(x, y, where)
    d = (x - y)[0, :, :8, 4:20]
    torch.testing.assert_close(terms.scalars["l1"], d.abs().mean() / len(x))
    torch.testing.assert_close(terms.scalars["l2"], d.square().mean() / len(x))
