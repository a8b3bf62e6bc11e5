"""Fill the Jinja templates in `templates/`: pages as HTML, the model card as Markdown.

    page = render("evaluation.html", result=result, charts=charts)

A page is one file that opens offline: images are `data:` URIs and charts are inline SVG. HTML
templates escape every value. It is an error if a template uses a variable that is not given.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from latentae.errors import LatentAEError
from latentae.progress import duration
from latentae.version import __version__

__all__ = ["DASH", "number", "render", "why"]

DASH = "-"
"""Shown for an unknown number."""


def render(template: str, **values: Any) -> str:
    """Fill one file of `templates/`.

    HTML templates find the macros of `toolkit.html` as `ui`.

    Raises:
        jinja2.UndefinedError: the template uses a variable that is not given.
        LatentAEError: a link leaves the folder of the page.
    """
    contents: dict[str, str] = {}  # anchor -> title of each section, filled while the page is rendered
    if template.endswith(".html"):
        toolkit = _environment().get_template("toolkit.html").make_module({"contents": contents})
        values |= {"ui": toolkit, "contents": contents}
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("latentae.pages"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"version": __version__}
    environment.filters |= {
        "columns": _columns,
        "count": _count,
        "duration": duration,
        "link": _link,
        "markdown": _markdown,
        "number": number,
        "percent": _percent,
        "literal": lambda value: json.dumps(value, ensure_ascii=False),
        "shape": lambda sides: " x ".join(map(str, sides)),
        "slug": lambda title: re.sub("[^a-z0-9]+", "-", title.lower()).strip("-"),
        "why": why,
    }
    return environment


def number(value: float | None, form: str = ".4g") -> str:
    """Format a number; unknown and non-finite numbers become a dash."""
    return DASH if value is None or not math.isfinite(value) else format(value, form)


def why(item: Mapping[str, Any] | None) -> str:
    """Say why an item of a result is missing; "" if it was measured."""
    if item is None:
        return "it was not part of this evaluation"
    return str(item.get("missing") or item.get("skipped") or "").rstrip(".")


def _percent(share: float | None) -> str:
    """0.25 -> "25 %"."""
    return number(share) if share is None else number(100 * share, ".3g") + " %"


def _count(amount: int, noun: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _columns(count: int, most: int) -> int:
    """Number of columns that fills the rows of `count` items most evenly, at most `most`."""
    return -(-count // -(-count // most)) if count else 1


def _link(path: str) -> str:
    if path.startswith(("/", "\\")) or ":" in path:
        raise LatentAEError(f"a page links to {path!r}, expected a path relative to the page's folder")
    return quote(path)


def _markdown(value: Any) -> str:
    """One line of text without meaning in Markdown, safe in a table cell."""
    return re.sub(r"([\\`*\[\]<|])", r"\\\1", " ".join(str(value).split()))
