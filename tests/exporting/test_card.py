"""The model card as text, for values that have a meaning in Markdown or Python."""

from __future__ import annotations

from dataclasses import replace

import pytest

from latentae.exporting.card import CardFacts, card_for_hub, model_card
from latentae.exporting.formats import component_config
from latentae.exporting.scaling import LatentScaling, MeasuredLatents


@pytest.fixture
def facts(tiny_model) -> CardFacts:
    factors = {"scaling_factor": 0.5, "shift_factor": 0.25}
    config = component_config(tiny_model().config, resolution=64, **factors, force_upcast=True)
    scaling = LatentScaling(**factors, origin="given at export")
    return CardFacts("vae", config, scaling, parameters=1234, resolution=64, weights="EMA", version="1.2.3")


def test_values_are_text_in_markdown_and_in_python(facts):
    name = 'a "b" <i>'
    card = model_card(
        replace(facts, name=name, weights="a|b\n# c", metrics={"P*S*NR": "[1](x)"}, formats=("onnx",))
    )
    assert '# a "b" \\<i>' in card
    assert "| Weights | a\\|b # c |" in card
    assert "| P\\*S\\*NR | \\[1\\](x) |" in card
    assert 'InferenceSession("a \\"b\\" <i>/vae_encoder/model.onnx")' in card
    assert "latents = (mean - 0.25) * 0.5" in card
    assert '{"latent_sample": latents / 0.5 + 0.25}' in card


def test_a_card_for_the_hub_loads_from_the_repository(facts):
    card = card_for_hub(model_card(replace(facts, name='my "vae"')), 'my "vae"', "owner/name")
    assert card.count('from_pretrained("owner/name")') == 2
    assert "OWNER/NAME" not in card


def test_every_part_of_a_card_is_there_only_if_it_was_measured(facts):
    assert "## Previews" not in model_card(facts)
    assert "Not measured. To measure, export" in model_card(facts)
    z = facts.config.latent_channels
    measured = MeasuredLatents(0.5, 0.25, (0.5,) * z, (1.5,) * z, 100)
    folded = LatentScaling(1.0, 0.0, "folded", measured, folded=True)
    card = model_card(replace(facts, scaling=folded, formats=("pt2",), training={"d.safetensors": "weights"}))
    assert (
        "Removed by the weights:\n\n| channel | mean | standard deviation |\n|---|---|---|\n| 0 | 0.5 | 1.5 |"
        in card
    )
    assert "latents = mean\ndecoded = decode((latents).contiguous())" in card
    assert "| d.safetensors | weights |" in card
    assert "library_name: latentae" in card
