from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from latentae.errors import LatentAEError
from latentae.pages.curves import line_chart
from latentae.pages.report import (
    Chart,
    Charts,
    Code,
    DataTable,
    Facts,
    Gallery,
    GalleryRow,
    Links,
    Notices,
    Paragraph,
    Picture,
    Section,
    Strip,
    Tiles,
    build_report,
)

EVIL = '<script>alert("x")</script>&\''
VOID = {"meta", "img", "link", "br"}


class Balance(HTMLParser):
    """Checks that every element is closed, and collects every address."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page() -> str:
    picture = Picture(torch.zeros(3, 4, 5, dtype=torch.uint8), EVIL, EVIL)
    blocks = [
        Paragraph(EVIL),
        Code(EVIL),
        Tiles([(EVIL, EVIL, EVIL)]),
        Facts([(EVIL, EVIL)]),
        Notices([("bad", EVIL)]),
        Gallery([GalleryRow(EVIL, [picture, picture])], EVIL),
        Strip(picture),
        DataTable([EVIL, "b"], [[(EVIL, EVIL), ("1", "")]], frozenset({(0, 1)}), EVIL),
        Charts([Chart(line_chart([(0, 1), (1, 2)], EVIL), EVIL)], EVIL),
        Links([(EVIL, 'a "b"/c d.json')]),
    ]
    return build_report(EVIL, EVIL, [Section(EVIL, blocks), Section("folded", blocks, folded=True)], EVIL)


def test_every_text_is_escaped_and_every_element_closed():
    parser = Balance()
    parser.feed(page())
    assert parser.open == []
    assert "script" not in parser.tags


def test_a_page_needs_nothing_from_outside():
    parser = Balance()
    parser.feed(page())
    assert parser.addresses
    for address in parser.addresses:
        assert not re.match(r"(?i)(https?:)?//|https?:|file:", address)
        assert address.startswith(("data:", "#")) or address == "a%20%22b%22/c%20d.json"
    assert not re.search(r"url\((?!#)|@import", page())


@pytest.mark.parametrize("path", ["/etc/passwd", "javascript:alert(1)", "https://example.org", "C:\\x"])
def test_links_stay_beside_the_page(path):
    with pytest.raises(LatentAEError, match="relative"):
        Links([("x", path)]).html()
