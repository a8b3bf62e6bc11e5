"""Which programs load an export under LDM's names: one rule, in the log, on the card and in the
docs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latentae import export
from latentae.exporting.formats import ldm_notes, ldm_problems
from latentae.models.autoencoder import AutoencoderKL
from latentae.models.presets import PRESETS, preset

F4, F8 = "kl-f4", "kl-f8"
LEVELS = {"down_block_types": ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",)}
UP_LEVELS = {
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")
}
NEITHER = {"use_quant_conv": False, "use_post_quant_conv": False}


# found by running the loaders of ComfyUI (a125cd84) and kohya's scripts on files of these shapes
@pytest.mark.parametrize(
    ("name", "overrides", "comfyui", "kohya"),
    [
        (F8, {}, True, True),
        (F4, {}, True, False),
        (F8, NEITHER, True, False),
        (F4, NEITHER, True, False),
        (F8, {"latent_channels": 16}, True, False),
        (F8, {"latent_channels": 16, **NEITHER}, True, False),
        (F8, {"latent_channels": 32}, False, False),
        (F8, {"latent_channels": 64}, False, False),
        (F8, {"use_quant_conv": False}, False, False),
        (F8, {"use_post_quant_conv": False}, False, False),
        (F8, LEVELS, False, False),
        (F8, UP_LEVELS, False, False),
        (F8, {"mid_block_add_attention": False}, False, False),
        (F8, {"layers_per_block": 1}, False, False),
        (F8, {"layers_per_block": 3}, False, False),
        (F8, {"norm_num_groups": 16}, False, False),
        (F8, {"in_channels": 1, "out_channels": 1}, False, False),
        (F8, {"out_channels": 4}, False, False),
        (F8, {"block_out_channels": (64, 128, 256, 256)}, False, False),
        (F8, {"block_out_channels": (128, 128, 256, 512)}, False, False),
        ("kl-f16", {}, False, False),
        ("kl-f16-z32", {}, False, False),
        ("kl-f32", {}, False, False),
        ("tiny", {}, False, False),
    ],
)
def test_where_a_shape_loads(name, overrides, comfyui, kohya):
    config = preset(name, **overrides)
    found = {program: not problems for program, problems in ldm_problems(config).items()}
    assert found == {"ComfyUI": comfyui, "A1111 and kohya's scripts": kohya}
    works, *_ = ldm_notes(config)
    assert works.startswith("This file works in ComfyUI" if comfyui else "This file does not work in ComfyUI")


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        (F8, LEVELS, ["attention in a level, which ComfyUI leaves out without an error"]),
        (
            "kl-f16",
            {},
            [
                "block_out_channels [128, 128, 256, 256, 512], not [128, 256, 512, 512] or [128, 256, 512]",
                "16 latent",
            ],
        ),
        ("kl-f32", {}, ["64 latent channels, by which ComfyUI takes the file for another model's"]),
        (F8, {"use_quant_conv": False}, ["1 of the two 1x1 convolutions at the latent, not both or neither"]),
        (
            "tiny",
            {},
            ["layers_per_block 1, not 2", "norm_num_groups 1, not 32", "no attention in the middle"],
        ),
        (F8, {"latent_channels": 16}, ["stable-diffusion.cpp leaves out the 1x1 convolutions"]),
        (F8, {}, ["the scaling"]),
    ],
)
def test_what_does_not_load_is_named(name, overrides, words):
    text = " ".join(ldm_notes(preset(name, **overrides)))
    assert all(word in text for word in words)


def test_convolutions_that_are_not_there_are_not_left_out():
    assert "stable-diffusion.cpp" not in " ".join(ldm_notes(preset("kl-f8-z16", **NEITHER)))


def test_the_log_and_the_card_say_it(tmp_path, capsys):
    config = preset("tiny", block_out_channels=(8, 8, 8))
    AutoencoderKL(config).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "vae", format="ldm", device="cpu")
    log, card = capsys.readouterr().err, (tmp_path / "vae/README.md").read_text()
    for note in ldm_notes(config):
        assert f"export: note: {note}" in log
        assert f"- {note}" in card


def test_the_docs_have_the_presets():
    docs = (Path(__file__).parents[2] / "docs/export.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^  \| ([\w-]+) \| ((?:yes|no) \| (?:yes|no)) \|$", docs, re.MULTILINE))
    expected = {
        name: " | ".join("no" if problems else "yes" for problems in ldm_problems(preset(name)).values())
        for name in PRESETS
    }
    assert table == expected
