from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentae.models.config import build
from latentae.models.presets import preset
from latentae.training.optim import autoencoder_optimizers, learning_rate_scale
from latentae.training.options import OptimizerOptions


def test_warmup_then_cosine_in_images():
    o = OptimizerOptions(warmup_images=100, final_lr_ratio=0.1)
    assert learning_rate_scale(o, 0, 1100) == pytest.approx(0.01)
    assert learning_rate_scale(o, 49, 1100) == pytest.approx(0.5)
    assert learning_rate_scale(o, 100, 1100) == pytest.approx(1.0)
    assert learning_rate_scale(o, 600, 1100) == pytest.approx(0.55)
    assert learning_rate_scale(o, 1100, 1100) == pytest.approx(0.1)


def test_a_network_that_begins_late_warms_up_from_there():
    o = OptimizerOptions(warmup_images=100, schedule="constant")
    assert learning_rate_scale(o, 1000, 5000, start=1000) == pytest.approx(0.01)
    assert learning_rate_scale(o, 1099, 5000, start=1000) == 1.0


@given(
    st.integers(0, 10_000),
    st.integers(1, 10_000),
    st.integers(0, 2000),
    st.sampled_from(["cosine", "constant"]),
)
def test_scale_stays_between_zero_and_one(seen, images, warmup, schedule):
    o = OptimizerOptions(warmup_images=warmup, schedule=schedule)
    assert 0 <= learning_rate_scale(o, seen, images) <= 1


@pytest.mark.parametrize("shape", ["dc-tiny", "tiny"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_trunk_has_a_rate_of_its_own_and_every_weight_one_optimizer(shape, name):
    model = build(preset(shape))
    optimizers = autoencoder_optimizers(model, [], OptimizerOptions(name=name, lr=1e-2, trunk_lr_ratio=0.1))
    found = {key: [p for group in o.param_groups for p in group["params"]] for key, o in optimizers.items()}
    assert sorted(id(p) for parameters in found.values() for p in parameters) == sorted(
        map(id, model.parameters())
    )
    trunk = {id(p) for key, p in model.named_parameters() if key in model.trunk_names()}
    assert {id(p) for p in found["autoencoder-trunk"]} == trunk
    rates = {key: o.param_groups[0]["lr"] for key, o in optimizers.items()}
    assert rates == {key: 1e-3 if key == "autoencoder-trunk" else 1e-2 for key in rates}


def test_a_part_that_is_all_trunk_or_a_rate_that_is_not_lower_needs_no_second_optimizer():
    model = build(preset("dc-tiny"))
    assert list(autoencoder_optimizers(model, [], OptimizerOptions())) == ["autoencoder"]
    model.requires_grad_(False)
    model.decoder.conv_out.requires_grad_(True)
    assert list(autoencoder_optimizers(model, [], OptimizerOptions(trunk_lr_ratio=0.1))) == [
        "autoencoder-trunk"
    ]
