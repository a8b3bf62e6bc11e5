from __future__ import annotations

import html
import json
import re

import pytest
import torch
from made_result import LABELS, add_pictures, full_result, missing_result, photo
from PIL import Image

from latentae.evaluation.evaluation_page import detail_sections, evaluation_sections, write_evaluation_report
from latentae.pages.images import write_png
from latentae.pages.pictures import LARGEST, PAGE_PIXELS, read_png, shown
from latentae.pages.report import Section


def text_of(sections: list[Section]) -> str:
    page = re.sub(r"<style.*?</style>", "", "".join(section.html() for section in sections), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


@pytest.fixture(scope="module")
def everything(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything")
    result = add_pictures(folder, full_result(evaluation[1], 24))
    write_evaluation_report(folder, result)
    return folder, result, evaluation_sections(folder, result)


def section(sections: list[Section], title: str) -> str:
    return text_of([found for found in sections if found.title == title])


def test_every_item_has_its_place_and_many_channels_are_folded(everything, evaluation, tmp_path):
    _, _, sections = everything
    assert [found.title for found in sections] == [
        "At a glance",
        "Pictures",
        "The hardest images",
        "The easiest images",
        "Against others",
        "Rate and distortion",
        "The latent space",
        "Disturbed latents",
        "Generating from the latent space",
    ]
    latent = section(sections, "The latent space")
    for wanted in (
        "effective rank 19.2",
        "active channels 23 of 24",
        "31 % of the latent's power",
        "71 % accuracy",
        "scaling_factor 0.7687",
    ):
        assert wanted in latent
    disturbed = section(sections, "Disturbed latents")
    for wanted in (
        "Safe in fp16",
        "rotation 90 0.73 19.30",
        "too small for it",
        "000 to 004",
        "68.2",
        "mid_block",
    ):
        assert wanted in disturbed
    generating = section(sections, "Generating from the latent space")
    assert "21.3 ± 0.8" in generating
    assert "A ranking aid" in generating
    page = next(found for found in sections if found.title == "The latent space").html()
    assert "<summary>The numbers of all 24 channels</summary>" in page
    assert "numbers of all" not in section(
        evaluation_sections(tmp_path, missing_result(evaluation[1])), "The latent space"
    )  # few: not folded


def test_the_table_has_every_method_and_the_details_what_was_left_out(everything):
    _, result, sections = everything
    table = section(sections, "Against others")
    for label in ("this model", *LABELS.values()):
        assert label in table
    row = table[table.index("kl-f8") :]
    assert row.startswith("kl-f8 4 x 32 x 32, 83.7 M parameters 28.39")
    assert "1.94 3,702 0.45 bits / pixel 0.0625" in row
    assert "broken: not measured; every reconstruction has infinite values." in table
    page = next(found for found in sections if found.title == "Against others").html()
    best = re.findall(r'<td class="best"[^>]*><span>([^<]*)', page)
    assert sorted(best) == ["0.0994", "0.9408", "1.94", "30.58"]
    assert "0.41 apart" in table
    details = text_of(detail_sections(result))
    for wanted in (
        "12 images that could not be read",
        "cat/007 the file ends early",
        "The first 1 of 12.",
        "enlarged 3 images",
        "300 of 312",
    ):
        assert wanted in details


def test_pictures_of_the_model_alone_for_the_hardest_and_easiest(everything):
    _, result, sections = everything
    pictures = {found.title: found.html().count("<img") for found in sections}
    methods = 1 + 6 + 1  # the original, every method, the error
    assert pictures["Pictures"] == 4 * methods
    assert pictures["The hardest images"] == pictures["The easiest images"] == 9
    assert "Colours of the error" in section(sections, "Pictures")
    assert len(result["examples"]) == 10


def test_what_is_missing_says_why(evaluation, tmp_path):
    result = json.loads(json.dumps(missing_result(evaluation[1])))  # as read from metrics.json
    write_evaluation_report(tmp_path, result)
    assert "How good is this autoencoder?" in (tmp_path / "report.html").read_text(encoding="utf-8")
    text = text_of(evaluation_sections(tmp_path, result))
    for wanted in (
        "Frechet distance: not measured; one image has no spread.",
        "PCA with as many floats: not measured; there is no training data.",
        "WebP in the same bytes: not measured; there is no training data.",
        "broken: not measured; every reconstruction has infinite values.",
        "Rate and distortion: not measured; no image could be stored.",
        "Spectrum: not measured; there is none of latents smaller than 4 x 4",
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
    write_evaluation_report(tmp_path, result)
    text = text_of([*evaluation_sections(tmp_path, result), *detail_sections(result)])
    assert "Disturbed latents" not in text
    assert "not measured" not in text
    assert (tmp_path / "report.html").is_file()


def test_large_pictures_share_the_page(evaluation, tmp_path):
    result = full_result(evaluation[1], 4)
    result["diffusability"] = {"missing": "it was not requested"}
    big = torch.nn.functional.interpolate(photo(0)[None].float(), size=(1024, 768)).to(torch.uint8)[0]
    files = {name: f"{name}.png" for name in ("original", "model", "heat")}
    for file in files.values():
        write_png(tmp_path / file, big)
    example = {"key": "a", "files": files, "psnr": {"model": 20.0}}
    result["examples"] = [{"kind": kind, **example} for kind in ("spread", "worst", "best") * 3]
    page = "".join(found.html() for found in evaluation_sections(tmp_path, result))
    sizes = [
        (int(width), int(height)) for width, height in re.findall(r'width="(\d+)" height="(\d+)" alt', page)
    ]
    assert len(sizes) == 27
    assert all(max(size) <= LARGEST for size in sizes)
    assert all(abs(width / height - 0.75) < 0.01 for width, height in sizes)
    assert 0.5 * PAGE_PIXELS < sum(width * height for width, height in sizes) <= PAGE_PIXELS
    assert "the files in examples/ are larger" in page


def test_shrinking_averages_and_files_of_any_color_are_shown(tmp_path):
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    image[:, :2, :2] = 200
    assert shown(image, 4) is image
    assert torch.equal(shown(image, 2)[0], torch.tensor([[200, 0], [0, 0]], dtype=torch.uint8))
    Image.new("L", (3, 2), 90).save(tmp_path / "gray.png")
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_png(tmp_path / "gray.png") == 90).all()
    assert (read_png(tmp_path / "clear.png") == 255).all()
