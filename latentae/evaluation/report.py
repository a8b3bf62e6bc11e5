"""Pages that open offline: small building blocks in, one self-contained HTML file out.

    page = build_report("Quickstart", "24 photos, 4 minutes of training", [Section("Pictures", [Gallery(...)]), ...])
    write_text(folder / "report.html", page)

Every text is escaped. Pictures become `data:` addresses and charts inline SVG, so a page asks for no other file and no network.
Colours follow the reader's light or dark setting; the layout fits a phone and a desktop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from urllib.parse import quote

from torch import Tensor

from latentae.errors import LatentAEError
from latentae.evaluation.images import data_uri

__all__ = [
    "Block",
    "Chart",
    "Charts",
    "Code",
    "DataTable",
    "Facts",
    "Gallery",
    "GalleryRow",
    "Links",
    "Notices",
    "Paragraph",
    "Picture",
    "Section",
    "Strip",
    "Tiles",
    "build_report",
]

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
        return f'<div class="tiles">{"".join(items)}</div>'


@dataclass(frozen=True)
class Facts:
    """Names and values, as a list of two columns."""

    pairs: Sequence[tuple[str, str]]

    def html(self) -> str:
        """As HTML."""
        return (
            "<dl>"
            + "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in self.pairs)
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
    """Rows of pictures with a caption for all."""

    rows: Sequence[GalleryRow]
    caption: str = ""

    def html(self) -> str:
        """As HTML."""
        rows = (
            f'<div class="group"><h3>{escape(row.title)}</h3><div class="pictures" style="--count:{len(row.pictures)}">'
            f"{''.join(picture.html() for picture in row.pictures)}</div></div>"
            for row in self.rows
        )
        return "".join(rows) + (f'<p class="caption">{escape(self.caption)}</p>' if self.caption else "")


@dataclass(frozen=True)
class Strip:
    """A picture made of many, such as a grid of images, as wide as the page; on a phone it is moved sideways."""

    picture: Picture

    def html(self) -> str:
        """As HTML."""
        widest = LARGEST_PIXEL * self.picture.image.shape[-1]
        return f'<div class="strip" style="--widest: {widest}px">{self.picture.html()}</div>'


@dataclass(frozen=True)
class DataTable:
    """A table; on a phone every row becomes a card, unless it is dense.

    Attributes:
        header: one name per column; the first column names the row.
        rows: cells as (text, small text under it).
        best: (row, column) of the cells to stress.
        caption: text under the table.
        dense: many rows of few short numbers: little space between them, a table on a phone too.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[tuple[str, str]]]
    best: frozenset[tuple[int, int]] = frozenset()
    caption: str = ""
    dense: bool = False

    def html(self) -> str:
        """As HTML."""
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in self.header)
        body = "".join(f"<tr>{self._cells(number, row)}</tr>" for number, row in enumerate(self.rows))
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        table = f'<table class="{"dense" if self.dense else "cards"}">'
        return f"{table}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{caption}"

    def _cells(self, number: int, row: Sequence[tuple[str, str]]) -> str:
        cells = []
        for column, (text, small) in enumerate(row):
            tag = 'th scope="row"' if column == 0 else "td"
            best = ' class="best"' if (number, column) in self.best else ""
            inner = escape(text) + (f"<small>{escape(small)}</small>" if small else "")
            cells.append(f'<{tag}{best} data-label="{escape(self.header[column])}"><span>{inner}</span></{tag.split()[0]}>')
        return "".join(cells)


@dataclass(frozen=True)
class Chart:
    """A line chart as an `<svg>` element made by `latentae.evaluation.curves`, and its title."""

    svg: str
    title: str


@dataclass(frozen=True)
class Charts:
    """Charts side by side."""

    charts: Sequence[Chart]
    caption: str = ""

    def html(self) -> str:
        """As HTML."""
        items = (f"<figure><figcaption><b>{escape(chart.title)}</b></figcaption>{chart.svg}</figure>" for chart in self.charts)
        caption = f'<p class="caption">{escape(self.caption)}</p>' if self.caption else ""
        return f'<div class="charts">{"".join(items)}</div>{caption}'


@dataclass(frozen=True)
class Links:
    """Files next to the page: (label, path relative to the page)."""

    links: Sequence[tuple[str, str]]

    def html(self) -> str:
        """As HTML."""
        for _, path in self.links:
            if path.startswith(("/", "\\")) or ":" in path:
                raise LatentAEError(f"a report links to files beside it, got {path!r}; give a path relative to the page")
        items = (f'<li><a href="{quote(path)}">{escape(label)}</a></li>' for label, path in self.links)
        return f'<ul class="links">{"".join(items)}</ul>'


Block = Paragraph | Code | Tiles | Facts | Notices | Gallery | Strip | DataTable | Charts | Links


@dataclass(frozen=True)
class Section:
    """A part of a page: a title, blocks, and whether the reader has to open it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    folded: bool = False

    def html(self) -> str:
        """As HTML."""
        inner = "".join(block.html() for block in self.blocks)
        if self.folded:
            return f"<section><details><summary><h2>{escape(self.title)}</h2></summary>{inner}</details></section>"
        return f"<section><h2>{escape(self.title)}</h2>{inner}</section>"


def build_report(title: str, subtitle: str, sections: Sequence[Section], footer: str = "") -> str:
    """A whole HTML page; nothing in it points outside the page but relative links."""
    style = resources.files("latentae.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    body = "".join(section.html() for section in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n<main>{body}</main>\n"
        f"<footer>{escape(footer)}</footer></body></html>\n"
    )
