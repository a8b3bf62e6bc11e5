"""Pages that open offline: small building blocks in, one self-contained HTML file out.

    page = build_report("Quickstart", "24 photos, 4 minutes of training", [Section("Pictures", [Gallery(...)]), ...])
    write_text(folder / "report.html", page)

Every text is escaped. Pictures become `data:` addresses and charts inline SVG, so a page asks for no other file and no network.
Colours follow the reader's light or dark setting; the layout fits a phone and a desktop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from urllib.parse import quote

from torch import Tensor

from latentae.errors import LatentAEError
from latentae.pages.charts import Key
from latentae.pages.images import data_uri

__all__ = [
    "Beside",
    "Block",
    "Chart",
    "Charts",
    "Code",
    "DataTable",
    "Facts",
    "Folded",
    "Gallery",
    "GalleryRow",
    "Legend",
    "Links",
    "Notices",
    "Paragraph",
    "Picture",
    "Scale",
    "Section",
    "Strip",
    "Tiles",
    "build_report",
]

MOST_COLUMNS, MOST_CHARTS = 6, 3  # of pictures or tiles, and of charts, beside each other
FEW_SECTIONS = 5  # a page with more has a list of them on top
LARGEST_PIXEL = 8  # of a picture as wide as the page, in CSS pixels
SMALL = 192  # pictures up to this side are enlarged without smoothing: their pixels are what is shown


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str

    def html(self) -> str:
        """As HTML."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Code:
    """Lines of code or of a terminal, as they are."""

    text: str

    def html(self) -> str:
        """As HTML."""
        return f"<pre><code>{escape(self.text)}</code></pre>"


@dataclass(frozen=True)
class Tiles:
    """Headline numbers: (label, value, note) each."""

    tiles: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        """As HTML."""
        items = (
            f'<div class="tile"><span class="label">{escape(label)}</span><strong>{escape(value)}</strong>'
            f'<span class="note">{escape(note)}</span></div>'
            for label, value, note in self.tiles
        )
        return f'<div class="tiles" style="--count:{_columns(len(self.tiles))}">{"".join(items)}</div>'


@dataclass(frozen=True)
class Facts:
    """Names and values, as a list of two columns."""

    pairs: Sequence[tuple[str, str]]

    def html(self) -> str:
        """As HTML."""
        return (
            "<dl>"
            + "".join(
                f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.pairs
            )
            + "</dl>"
        )


@dataclass(frozen=True)
class Notices:
    """Sentences a reader must not overlook: (kind, text), kind "good", "bad" or "note"."""

    notices: Sequence[tuple[str, str]]

    def html(self) -> str:
        """As HTML."""
        signs = {"good": "✓", "bad": "✗", "note": "·"}
        items = (
            f'<li class="{kind}"><span aria-hidden="true">{signs[kind]}</span><span>{escape(text)}</span></li>'
            for kind, text in self.notices
        )
        return f'<ul class="notices">{"".join(items)}</ul>' if self.notices else ""


@dataclass(frozen=True)
class Picture:
    """An image uint8 [3, H, W] with a label and a detail under it."""

    image: Tensor
    label: str
    detail: str = ""

    def html(self) -> str:
        """As HTML."""
        height, width = self.image.shape[1:]
        crisp = ' class="crisp"' if max(height, width) <= SMALL else ""
        return (
            f'<figure><img{crisp} src="{data_uri(self.image)}" width="{width}" height="{height}" alt="{escape(self.label)}">'
            f"<figcaption><b>{escape(self.label)}</b> <span>{escape(self.detail)}</span></figcaption></figure>"
        )


@dataclass(frozen=True)
class GalleryRow:
    """Pictures that belong together (one image and what became of it), under a title."""

    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures with a caption for all; `pairs` puts two short rows beside each other where there is room."""

    rows: Sequence[GalleryRow]
    caption: str = ""
    pairs: bool = False

    def html(self) -> str:
        """As HTML."""
        rows = (
            f'<div class="group"><h3>{escape(row.title)}</h3><div class="pictures" style="--count:{_columns(len(row.pictures))}">'
            f"{''.join(picture.html() for picture in row.pictures)}</div></div>"
            for row in self.rows
        )
        groups = f'<div class="pairs">{"".join(rows)}</div>' if self.pairs else "".join(rows)
        return groups + (f'<p class="caption">{escape(self.caption)}</p>' if self.caption else "")


def _columns(count: int, most: int = MOST_COLUMNS) -> int:
    """As many as there are things, or as even rows as can be."""
    return -(-count // -(-count // most)) if count else 1


@dataclass(frozen=True)
class Scale:
    """What colours stand for: a CSS gradient from left to right, evenly spaced texts under it, and a title."""

    gradient: str
    ticks: Sequence[str]
    title: str

    def html(self) -> str:
        """As HTML."""
        ticks = "".join(f"<span>{escape(tick)}</span>" for tick in self.ticks)
        bar = f'<div class="bar" style="background: {escape(self.gradient)}"></div>'
        return f'<div class="scale"><p>{escape(self.title)}</p>{bar}<div class="ticks">{ticks}</div></div>'


@dataclass(frozen=True)
class Strip:
    """A picture made of many, such as a grid of images, as wide as the page; on a phone it is moved sideways, unless it has to fit."""

    picture: Picture
    fit: bool = False

    def html(self) -> str:
        """As HTML."""
        widest = LARGEST_PIXEL * self.picture.image.shape[-1]
        return f'<div class="strip{" fit" if self.fit else ""}" style="--widest: {widest}px">{self.picture.html()}</div>'


@dataclass(frozen=True)
class DataTable:
    """A table; on a phone every row becomes a card, unless it is dense or wide.

    Attributes:
        header: one name per column; the first column names the row.
        rows: cells as (text, small text under it).
        best: (row, column) of the cells to stress.
        caption: text under the table.
        dense: many rows of few short numbers: little space between them, a table on a phone too.
        wide: many columns: on a phone the table is moved sideways under its first column, so that rows can be compared.
        strong: rows to stress.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[tuple[str, str]]]
    best: frozenset[tuple[int, int]] = frozenset()
    caption: str = ""
    dense: bool = False
    wide: bool = False
    strong: frozenset[int] = frozenset()

    def html(self) -> str:
        """As HTML."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.header)
        rows = (
            (' class="strong"' if number in self.strong else "", self._cells(number, row))
            for number, row in enumerate(self.rows)
        )
        body = "".join(f"<tr{look}>{cells}</tr>" for look, cells in rows)
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        looks = [look for look in ("dense", "wide") if getattr(self, look)] or ["cards"]
        table = (
            f'<table class="{" ".join(looks)}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
        )
        return f'<div class="sideways" tabindex="0">{table}</div>{caption}' if self.wide else table + caption

    def _cells(self, number: int, row: Sequence[tuple[str, str]]) -> str:
        cells = []
        for column, (text, small) in enumerate(row):
            tag = 'th scope="row"' if column == 0 else "td"
            best = ' class="best"' if (number, column) in self.best else ""
            inner = escape(text) + (f"<small>{escape(small)}</small>" if small else "")
            cells.append(
                f'<{tag}{best} data-label="{escape(self.header[column])}"><span>{inner}</span></{tag.split()[0]}>'
            )
        return "".join(cells)


@dataclass(frozen=True)
class Chart:
    """A chart as an `<svg>` element made by `latentae.pages.charts`, its title, and what its colours and shapes mean."""

    svg: str
    title: str
    legend: Sequence[Key] = ()

    def html(self) -> str:
        """As HTML."""
        return f"<figure><figcaption><b>{escape(self.title)}</b></figcaption>{self.svg}{Legend(self.legend).html()}</figure>"


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    charts: Sequence[Chart]
    caption: str = ""

    def html(self) -> str:
        """As HTML."""
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        columns = _columns(len(self.charts), MOST_CHARTS)
        return f'<div class="charts" style="--count:{columns}">{"".join(chart.html() for chart in self.charts)}</div>{caption}'


@dataclass(frozen=True)
class Legend:
    """What the colours of several charts stand for."""

    keys: Sequence[Key]

    def html(self) -> str:
        """As HTML."""
        return f'<ul class="legend">{"".join(key.html() for key in self.keys)}</ul>' if self.keys else ""


@dataclass(frozen=True)
class Links:
    """Files next to the page: (label, path relative to the page)."""

    links: Sequence[tuple[str, str]]

    def html(self) -> str:
        """As HTML."""
        for _, path in self.links:
            if path.startswith(("/", "\\")) or ":" in path:
                raise LatentAEError(
                    f"a report links to files beside it, got {path!r}; give a path relative to the page"
                )
        items = (f'<li><a href="{quote(path)}">{escape(label)}</a></li>' for label, path in self.links)
        return f'<ul class="links">{"".join(items)}</ul>'


@dataclass(frozen=True)
class Beside:
    """Two columns of blocks where there is room, else one after the other; the left one is the wider."""

    left: Sequence[Block]
    right: Sequence[Block]

    def html(self) -> str:
        """As HTML."""
        columns = ("".join(block.html() for block in column) for column in (self.left, self.right))
        return '<div class="beside">' + "".join(f"<div>{column}</div>" for column in columns) + "</div>"


@dataclass(frozen=True)
class Folded:
    """Blocks that the reader has to open."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """As HTML."""
        inner = "".join(block.html() for block in self.blocks)
        return f'<details class="folded"><summary>{escape(self.title)}</summary>{inner}</details>'


Block = (
    Paragraph
    | Code
    | Tiles
    | Facts
    | Notices
    | Gallery
    | Scale
    | Strip
    | DataTable
    | Charts
    | Legend
    | Links
    | Beside
    | Folded
)


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, blocks, and whether the reader has to open it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    folded: bool = False

    def html(self, anchor: str = "") -> str:
        """As HTML, under the name `anchor` if there is one."""
        inner = "".join(block.html() for block in self.blocks)
        name = f' id="{escape(anchor)}"' if anchor else ""
        if self.folded:
            return f"<section{name}><details><summary><h2>{escape(self.title)}</h2></summary>{inner}</details></section>"
        return f"<section{name}><h2>{escape(self.title)}</h2>{inner}</section>"


def build_report(title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> str:
    """A whole HTML page; nothing in it points outside the page but relative links. A long one begins with a list of its sections."""
    style = resources.files("latentae.pages").joinpath("report.css").read_text(encoding="utf-8")
    anchors = [
        f"{number}-{re.sub('[^a-z0-9]+', '-', section.title.lower()).strip('-')}"
        for number, section in enumerate(sections, 1)
    ]
    body = "".join(section.html(anchor) for section, anchor in zip(sections, anchors, strict=True))
    links = (
        f'<a href="#{anchor}">{escape(section.title)}</a>'
        for section, anchor in zip(sections, anchors, strict=True)
    )
    nav = f'<nav aria-label="On this page">{"".join(links)}</nav>' if len(sections) > FEW_SECTIONS else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n{nav}<main>{body}</main>\n"
        f"<footer>{escape(footer)}</footer></body></html>\n"
    )
