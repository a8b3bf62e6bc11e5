from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_it_trains_measures_and_draws(run, tmp_path):
    pytest.importorskip("sklearn")
    folders = [
        "--runs",
        tmp_path / "runs",
        "--pictures",
        tmp_path / "pictures",
        "--out",
        tmp_path / "family.json",
    ]
    code, output = run("family_page", *folders, "--only", "linear-digits", "--digit-images", 256)
    assert code == 0, output
    found = json.loads((tmp_path / "family.json").read_text())
    assert found["variants"]["linear-digits"]["error_over_pca_on_training_digits"] > 1, (
        "nothing beats PCA where it was fitted"
    )
    with Image.open(tmp_path / "pictures" / "family-linear-digits.png") as picture:
        assert picture.size == (10 * (4 * 8 + 3) + 3, 3 * (4 * 8 + 3) + 3)


def test_the_page_shows_every_recipe_of_the_family_with_a_small_picture():
    page = (ROOT / "docs" / "family.md").read_text(encoding="utf-8")
    recipes = {file.stem for file in (ROOT / "latentae" / "recipes").glob("*-digits.toml")}
    recipes |= {file.stem for file in (ROOT / "latentae" / "recipes").glob("*-tiny.toml")}
    recipes.discard("dc-tiny")  # another architecture, in docs/deep_compression.md
    assert len(recipes) == 16
    assert not [name for name in recipes if f"`{name}`" not in page]
    pictures = re.findall(r"\]\((images/family-.*?\.png)\)", page)
    assert len(pictures) >= 15
    for name in pictures:
        assert (ROOT / "docs" / name).stat().st_size < 60_000, name
