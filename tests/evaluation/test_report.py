from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from made_result import LABELS, add_pictures, full_result, missing_result, photo
from page_reader import Page

from latentae.evaluation.report import PAGE_PIXELS, write_evaluation_report
from latentae.examples.quickstart import write_quickstart_page
from latentae.pages.images import LARGEST, write_png
from latentae.training.recipe import load_recipe

EVIL = '<script>alert("x")</script>&\''


def written(folder, result) -> Page:
    write_evaluation_report(folder, result)
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def everything(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    result = add_pictures(folder, full_result(evaluation[1], 24))
    return result, written(folder, result)


def test_every_item_has_its_place_and_many_channels_are_folded(everything, evaluation, tmp_path):
    _, page = everything
    assert list(page.sections) == [
        "At a glance",
        "Pictures",
        "The hardest images",
        "The easiest images",
        "Comparison with other methods",
        "Rate and distortion",
        "The latent space",
        "Disturbed latents",
        "Generating from the latent space",
        "How it was measured",
        "What was measured, and with what",
        "Files",
    ]
    assert all(f'href="#{number}-' in page.html for number in range(1, 13)), "the sections are listed on top"
    latent = page.section("The latent space")
    for wanted in (
        "effective rank 19.2",
        "active channels 23 of 24",
        "31 % of the latent's power",
        "71 % accuracy",
        "scaling_factor 0.7687",
    ):
        assert wanted in latent
    disturbed = page.section("Disturbed latents")
    for wanted in (
        "Safe in fp16",
        "rotation 90 0.73 19.30",
        "too small for it",
        "000 to 004",
        "68.2",
        "mid_block",
    ):
        assert wanted in disturbed
    generating = page.section("Generating from the latent space")
    assert "21.3 ± 0.8" in generating
    assert "A ranking aid" in generating
    assert "<summary>The numbers of all 24 channels</summary>" in page.html
    few = written(tmp_path, missing_result(evaluation[1]))
    assert "numbers of all" not in few.text


def test_the_table_has_every_method_and_the_details_what_was_left_out(everything):
    _, page = everything
    table = page.section("Comparison with other methods")
    for label in ("this model", *LABELS.values()):
        assert label in table
    row = table[table.index("kl-f8") :]
    assert row.startswith("kl-f8 4 x 32 x 32, 83.7 M parameters 28.39")
    assert "1.94 3,702 0.45 bits / pixel 0.0625" in row
    assert "broken: not measured; every reconstruction has infinite values." in table
    best = re.findall(r'<td class="best"[^>]*><span>([^<]*)', page.html)
    assert sorted(best) == ["0.0994", "0.9408", "1.94", "30.58"]
    assert "0.41 apart" in table
    details = page.section("What was measured, and with what")
    for wanted in (
        "12 images could not be read",
        "cat/007 the file ends early",
        "The first 1 of 12.",
        "enlarged 3 images",
        "300 of 312",
    ):
        assert wanted in details


def test_pictures_of_the_model_alone_for_the_hardest_and_easiest(everything):
    result, page = everything
    pictures = {title: section.count("<img") for title, section in page.sections.items()}
    methods = 1 + 6 + 1  # the original, every method, the error
    assert pictures["Pictures"] == 4 * methods
    assert pictures["The hardest images"] == pictures["The easiest images"] == 9
    assert "Colors of the error" in page.section("Pictures")
    assert len(result["examples"]) == 10


def test_what_is_missing_says_why(evaluation, tmp_path):
    result = json.loads(json.dumps(missing_result(evaluation[1])))  # as read from metrics.json
    text = written(tmp_path, result).text
    assert "How good is this autoencoder?" in text
    for wanted in (
        "Frechet distance: not measured; one image has no spread.",
        "PCA with as many floats: not measured; there is no training data.",
        "WebP in the same bytes: not measured; there is no training data.",
        "broken: not measured; every reconstruction has infinite values.",
        "Rate and distortion: not measured; no image could be stored.",
        "Spectrum: not measured; it needs latents of at least 4 x 4 that vary.",
        "Linear probe: not measured; no image has a label.",
        "Half precision: not measured; the model can't be traced.",
        "Interpolation: not measured; it takes two images.",
        "Noise on the latent: not measured; no image has a finite PSNR.",
        "latents are not square",
        "Diffusability: not measured; there is no extractor.",
        "none: the latent is constant",
    ):
        assert wanted in text
    assert not re.search(r"\b(None|nan|NaN|inf)\b", text)


def test_an_older_result_without_the_new_items_still_has_a_page(evaluation, tmp_path):
    result = full_result(evaluation[1], 4)
    for key in ("frechet", "compared", "diagnostics", "rate_distortion", "diffusability"):
        del result[key]
    for key in (
        "kl_nats_per_channel",
        "channel_mean_variance",
        "active_units",
        "effective_rank",
        "spectrum",
        "probe",
    ):
        del result["latent"][key]
    for key in ("skipped", "skipped_count", "enlarged", "gray", "sixteen_bit", "channels"):
        del result["data"][key]
    for name in ("dct", "webp"):
        del result["baselines"][name]
    text = written(tmp_path, result).text
    assert "Disturbed latents" not in text
    assert "not measured" not in text


def test_large_pictures_share_the_page(evaluation, tmp_path):
    result = full_result(evaluation[1], 4)
    result["diffusability"] = {"missing": "it was not requested"}
    big = torch.nn.functional.interpolate(photo(0)[None].float(), size=(1024, 768)).to(torch.uint8)[0]
    files = {name: f"{name}.png" for name in ("original", "model", "heat")}
    for file in files.values():
        write_png(tmp_path / file, big)
    example = {"key": "a", "files": files, "psnr": {"model": 20.0}}
    result["examples"] = [{"kind": kind, **example} for kind in ("spread", "worst", "best") * 3]
    page = written(tmp_path, result).html
    sizes = [
        (int(width), int(height)) for width, height in re.findall(r'width="(\d+)" height="(\d+)" alt', page)
    ]
    assert len(sizes) == 27
    assert all(max(size) <= LARGEST for size in sizes)
    assert all(abs(width / height - 0.75) < 0.01 for width, height in sizes)
    assert 0.5 * PAGE_PIXELS < sum(width * height for width, height in sizes) <= PAGE_PIXELS
    assert "the files in examples/ are larger" in page


def test_every_text_of_a_result_is_escaped(evaluation, tmp_path):
    texts = ("label", "text", "missing", "reason", "key", "path", "transform", "limits", "extractor", "mode")

    def spoil(value, key=""):
        if isinstance(value, dict):
            more = {EVIL: EVIL} if key in ("conventions", "environment") else {}
            return {name: spoil(item, name) for name, item in value.items()} | more
        if isinstance(value, list):
            return [spoil(item, key) for item in value]
        return EVIL if key in texts else value

    result = add_pictures(tmp_path, full_result(evaluation[1], 4))
    del result["latent"]["probe"]
    page = written(tmp_path, spoil(result))
    assert "script" not in page.tags
    assert page.text.count(EVIL) > 30


def test_the_page_of_the_quickstart_includes_the_results(evaluation, tmp_path):
    result = add_pictures(tmp_path / "evaluation", full_result(evaluation[1], 4))
    result["compared"] = result["compared"][:1]
    check = SimpleNamespace(version="0.42", key="a", decoded=photo(0), largest_difference=1e-6, images=8)
    recipe = load_recipe("dc-tiny", {"data": {"shards": "shards"}})
    write_quickstart_page(tmp_path, result, check, recipe, {"training": 12.3})
    page = Page(tmp_path / "report.html")
    assert {"At a glance", "The latent space", "Files"} <= set(page.sections)
    start = page.section("From PCA to the trained model")
    assert "PCA 25.93" in start
    assert "trained 27.30" in start
    assert page.sections["From PCA to the trained model"].count("<img") == 4 * 4
    assert "the largest difference of any value is 1.0e-06" in page.section("In diffusers").lower()
    assert "training 12 s" in page.section("The steps")
    assert (tmp_path / "decoded-by-diffusers.png").is_file()
