"""A page of tables, figures and notes, as HTML and as Markdown, for the results and the benchmarks.

page = Page("Title", [Section("Memory", table=frame, note="MiB")])
html(page)        # needs no other file
markdown(page)    # figures are links to their files
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import markupsafe
import pandas as pd

from memcnn.needs import INSTALL
from reports import text
from reports.cells import DASH
from reports.verdict import DIFFERS, NOT_ENOUGH, REPRODUCED

VERDICTS = (REPRODUCED, DIFFERS, NOT_ENOUGH)
PROSE = ("device", "execution", "why it does not count")
"""Names of columns whose cells may wrap."""

MISSING = "From the top of the repository, these commands install what is needed and measure the missing values:"


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        title: the caption.
        svg: the picture as SVG.
        link: path of the picture for Markdown pages; "" leaves it out there.
    """

    title: str
    svg: str
    link: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a page with its own heading.

    Attributes:
        title: the heading.
        note: a paragraph above the table.
        table: a frame of text, see ``reports.cells``.
        cards: (title, frame) pairs that replace the tables on a narrow screen; Markdown leaves such a section out.
        figures: pictures.
        notes: remarks below the table.
        command: a command that measures the missing values.
        links: (text, address) pairs of the files behind each row of the table, in a last column.
        warning: a sentence that qualifies everything in the section.
        wide: True hides the section on a narrow screen, where the cards of another section replace it.
    """

    title: str
    note: str = ""
    table: pd.DataFrame | None = None
    cards: Sequence[tuple[str, pd.DataFrame]] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    command: str = ""
    links: Sequence[Sequence[tuple[str, str]]] = ()
    warning: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: the heading.
        sections: the parts.
        summary: the result in one or more sentences.
        origin: device and software of the measurements, one text for each device.
        commands: the commands that create the page, in order.
        warning: a sentence that qualifies the whole page.
        links: (text, address) pairs of the data behind the page.
    """

    title: str
    sections: Sequence[Section]
    summary: Sequence[str] = ()
    origin: Sequence[str] = ()
    commands: Sequence[str] = ()
    warning: str = ""
    links: Sequence[tuple[str, str]] = ()


SORT = Path(__file__).with_name("sort.js").read_text("utf-8")
"""The page's only script: it sorts a table by a column when the reader activates its heading."""


def html(page: Page) -> str:
    """Return the page as HTML that needs no other file; links lead to the data behind it. All text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions = {"code": _code, "heads": _heads, "rows": _rows, "groups": text.groups, "inline": inline_svg}
    words = {"sort": SORT, "missing": MISSING, "install": INSTALL}
    return environment.get_template("page.html").render(page=page, **functions, **words)


def markdown(page: Page) -> str:
    """Return the page as Markdown for GitHub."""
    commands = ", then ".join(f"`{command}`" for command in page.commands)
    parts = [f"# {page.title}", f"Made by {commands}." if commands else ""]
    parts += [_list([text.escape_markdown(line) for line in page.origin])]
    parts += [_list([text.escape_markdown(line) for line in page.summary])]
    parts += [f"**Warning:** {page.warning}" if page.warning else ""]
    for section in page.sections:
        if section.cards:
            continue
        parts += [f"## {section.title}", section.note]
        parts += [f"**Warning:** {section.warning}" if section.warning else ""]
        parts += [text.markdown(section.table) if section.table is not None else ""]
        parts += [f"![{figure.title}]({figure.link})" for figure in section.figures if figure.link]
        parts += ["\n".join(f"* {text.escape_markdown(note)}" for note in section.notes)]
        if section.command:
            parts += [MISSING, f"```sh\n{INSTALL}\n{section.command}\n```"]
    return "\n\n".join(part for part in parts if part) + "\n"


def text_frame(table: pd.DataFrame) -> pd.DataFrame:
    """Convert a frame of numbers and text to a frame of text, with six significant digits.

    Args:
        table: one row for each line of the table; its columns have plain names.
    """
    columns = {("", str(name)): [_formatted(value) for value in column] for name, column in table.items()}
    return pd.DataFrame(columns, dtype=object)


def inline_svg(svg: str, prefix: str) -> str:
    """Return a picture for use in a page with several pictures.

    Args:
        svg: a picture as matplotlib writes it.
        prefix: unique in the page; it is added to all names to which the picture refers.
    """
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    referred = set(re.findall(r'(?:href="#|url\(#)([\w.-]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda name: f' id="{prefix}-{name[1]}"' if name[1] in referred else "", svg)
    svg = re.sub(r'(href="#|url\(#)(?=[\w.-]+)', rf"\g<1>{prefix}-", svg)
    kind = "ink" if "currentColor" in svg else "paper"  # "paper": drawn for white paper, so inverted on a dark page
    svg = svg.replace("fill: #ffffff", "fill: none") if kind == "paper" else svg
    width = re.search(r'width="([\d.]+)pt"', svg)
    style = f'style="--width: {float(width[1]) / 12:.1f}rem"' if width else ""  # so that 12 points are the page's text
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" class="{kind}" {style}', svg, count=1)


def _code(note: str) -> markupsafe.Markup:
    """Return a note as HTML; what stands between backticks is code."""
    return markupsafe.Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(note))))


def _formatted(value: object) -> str:
    """Return a number with six significant digits, text as it is, and a dash for a missing value."""
    return value if isinstance(value, str) else DASH if pd.isna(value) else f"{value:.6g}"


def _list(lines: Sequence[str]) -> str:
    """Return one line as a paragraph, several as a list."""
    return "\n".join(lines if len(lines) == 1 else (f"* {line}" for line in lines))


def _heads(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (name, class) of each column."""
    return [(name, "left" if name in text.LEFT else "") for _, name in frame.columns]


def _rows(frame: pd.DataFrame) -> list[list[tuple[str, str]]]:
    """Return (text, classes) of each cell."""
    names = [name for _, name in frame.columns]
    return [[_cell(cell, name) for cell, name in zip(row, names, strict=True)] for row in frame.itertuples(index=False)]


def _cell(cell: str, name: str) -> tuple[str, str]:
    classes = ["left"] if name in text.LEFT else []
    classes += ["prose"] if name in PROSE else []
    classes += ["none"] if cell == DASH else []
    classes += [cell.replace(" ", "-")] if cell in VERDICTS else []
    unbroken = re.sub(r"(?<=\d) (?=min\b|s\b)|(?<=min) (?=\d)", "\N{NO-BREAK SPACE}", cell)
    return unbroken, " ".join(classes)
