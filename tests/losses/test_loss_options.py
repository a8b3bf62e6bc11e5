from __future__ import annotations

import math

import pytest

from latentae.losses.options import LossOptions


def test_effective_weights_name_every_term_without_building_a_network():
    options = LossOptions(
        wavelet=0.1,
        learn_logvar=True,
        initial_logvar=math.log(2.0),
        perceptual={"net": "efficientnet-lite0", "gram": 2.0},
        classifier={"weight": 0.1, "backbone": "convnext_tiny"},
        adversarial={
            "weight": 0.5,
            "adaptive": True,
            "max_ratio": 0.05,
            "loss": "vanilla",
            "r1": 10.0,
            "lecam": 0.01,
        },
        alignment={"weight": 0.1, "backbone": "vit_tiny_patch16_224"},
    )
    assert options.effective_weights() == {
        "l1": "0.5",
        "wavelet": "0.05",
        "efficientnet-lite0": "0.5",
        "gram (efficientnet-lite0)": "1",
        "logits (convnext_tiny)": "0.05",
        "kl": "1e-06",
        "log-variance (learned)": "1",
        "adversarial (vanilla, patch)": "0.5 x adaptive ratio up to 0.05",
        "r1": "10",
        "lecam": "0.01",
        "alignment (vit_tiny_patch16_224)": "0.1 x adaptive ratio",
    }
    assert LossOptions().effective_weights() == {"l1": "1", "LPIPS (vgg)": "1", "kl": "1e-06"}


def test_what_makes_no_loss_is_refused():
    with pytest.raises(ValueError, match="gram"):
        LossOptions(perceptual={"net": "none", "gram": 1.0})
    with pytest.raises(ValueError, match="l3"):
        LossOptions(l3=1.0)  # pyright: ignore
