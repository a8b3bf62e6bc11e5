from __future__ import annotations

from importlib import resources

import pytest
from jinja2 import UndefinedError
from page_reader import Page

from latentae.errors import LatentAEError
from latentae.pages.render import number, render


def comparison(**changes) -> str:
    """A page without runs and evaluations."""
    nothing = {"recipes": {}, "evaluation": {"reason": None}, "paired": [], "latentae": "1.2.3"}
    values = {"names": ["a", "b"], "runs": {"rows": []}, "evaluations": {"rows": []}, "result": nothing}
    lists = dict.fromkeys(("notices", "keys", "pictures", "links", "recipe_names"), ())
    return render("comparison.html", **{**values, **lists, "curves": {}, **changes})


def test_the_templates_and_the_style_sheet_ship_with_the_package():
    folder = resources.files("latentae.pages").joinpath("templates")
    files = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    assert {"base.html", "toolkit.html", "page.css", "card.md"} <= set(files)
    assert {"evaluation.html", "comparison.html", "training_summary.html", "quickstart.html"} <= set(files)
    assert "prefers-color-scheme: dark" in files["page.css"]
    assert files["page.css"] in comparison()


def test_a_value_that_is_not_given_is_an_error():
    with pytest.raises(UndefinedError, match="'names' is undefined"):
        render("comparison.html")


@pytest.mark.parametrize("path", ["/etc/passwd", "javascript:alert(1)", "https://example.org", "C:\\x"])
def test_links_stay_in_the_folder_of_the_page(path):
    with pytest.raises(LatentAEError, match="relative"):
        comparison(links=[("x", path)])
    page = Page(comparison(links=[("<x>", 'a "b"/c d.json')]))
    assert page.addresses == ["data:,", "a%20%22b%22/c%20d.json"]


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [(0.25, ".4g", "0.25"), (None, ".4g", "-"), (float("nan"), ".2f", "-"), (12345, ",", "12,345")],
)
def test_unknown_numbers_are_dashes(value, form, text):
    assert number(value, form) == text
