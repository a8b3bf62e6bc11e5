"""Parse a page and check that it closes its elements and loads nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "link", "br"}
ADDRESSES = ("src", "href", "xlink:href", "srcset")


class Page(HTMLParser):
    """The text, tags and addresses of a page.

    Attributes:
        sections: title -> its HTML.
    """

    def __init__(self, page: Path | str) -> None:
        super().__init__()
        self.html = page.read_text(encoding="utf-8") if isinstance(page, Path) else page
        self._open, self.tags, self.addresses, self._texts = [], [], [], []
        self.feed(self.html)
        assert self._open == []
        assert not re.search(r"url\((?!#)|@import", self.html)
        self.text = " ".join(" ".join(self._texts).split())
        found = re.findall(r"<section id=.*?</section>", self.html, re.DOTALL)
        self.sections = {re.findall(r"<h2>(.*?)</h2>", section)[0]: section for section in found}

    def section(self, title: str) -> str:
        """The text of a section."""
        return Page(self.sections[title]).text

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ADDRESSES:
                assert not re.match(r"(?i)[\\/]|(?!data:)[a-z]+:", value), value
                self.addresses.append(value)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert tag in VOID or self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] != "style":
            self._texts.append(data)
