from __future__ import annotations

import pytest
import torch

from latentae.losses.objective import Objective
from latentae.losses.options import LossOptions
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.config import preset


def small() -> AutoencoderKL:
    return AutoencoderKL(preset("tiny", block_out_channels=(8, 8, 8), norm_num_groups=4))


def options(**values) -> LossOptions:
    return LossOptions(**{"l1": 0.0, "kl": 0.0, "perceptual": {"net": "none"}, **values})


def test_total_is_the_weighted_sum_of_the_named_means():
    x, y = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    terms = Objective(options(l1=0.5, l2=2.0, charbonnier=0.1)).image_terms(x, y)
    assert set(terms.scalars) == {"l1", "l2", "charbonnier"}
    expected = 0.5 * terms.scalars["l1"] + 2.0 * terms.scalars["l2"] + 0.1 * terms.scalars["charbonnier"]
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(terms.scalars["l1"], (x - y).abs().mean())


def test_the_perceptual_gradient_reaches_the_decoder_and_the_encoder():
    model = small()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    objective = Objective(options(perceptual={"net": "efficientnet-lite0", "weight": 1.0}))
    objective.image_terms(model(x).reconstruction, x).total.backward()
    for name in ("decoder.conv_out.weight", "decoder.conv_in.weight", "encoder.conv_in.weight"):
        gradient = model.get_parameter(name).grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_kl_weight_scales_the_latent_term_only():
    posterior = small().encode(torch.rand(2, 3, 32, 32))
    images = torch.zeros(2, 3, 32, 32)
    terms = Objective(options(kl=1e-3)).latent_terms(posterior, images)
    torch.testing.assert_close(terms.total, 1e-3 * terms.scalars["kl"])
    torch.testing.assert_close(terms.scalars["kl"], posterior.kl().mean() / (3 * 32 * 32))


def test_effective_weights_list_what_is_active():
    weights = Objective(options(l1=1.0, kl=1e-6, adversarial={"weight": 0.1})).effective_weights()
    assert weights == {"l1": 1.0, "kl": 1e-6, "adversarial (hinge)": 0.1}


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="l3"):
        LossOptions(l3=1.0)  # pyright: ignore
