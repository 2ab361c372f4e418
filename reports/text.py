"""Render a frame of text as a Markdown, LaTeX or terminal table.

Each function takes a frame whose columns are (group, name) pairs and whose cells are lines of printable characters; see
``reports.cells``. tabulate lays out Markdown, and pandas' Styler LaTeX. We escape text ourselves, because tabulate does
not escape, and Styler does not escape ``<``, ``>``, ``|``, quotes, and signs that some font encodings lack.
"""

import re
import textwrap
from itertools import groupby

import pandas as pd
from tabulate import tabulate

LEFT = {"", "model", "data set", "verdict", "data", "device", "execution", "torch", "commit", "why it does not count"}
"""Names of left-aligned columns; all others are right-aligned."""
NOTED = ("why it does not count", "device", "execution", "torch", "commit")
IN_NOTES = ("batch", "data")  # `why it does not count` contains them
SHORT = {
    "TensorFlow, published": "TensorFlow",
    "PyTorch, published": "PyTorch",
    "published (PyTorch)": "published",
    "accuracy %": "acc. %",
    "parameters MiB": "param.",
    "activations MiB": "activ.",
    "of published": "of publ.",
    "interruptions": "stops",
    "difference": "diff.",
    "measured on a GPU, activations MiB": "GPU activations",
}
"""Short names of groups and columns, for narrow terminals."""

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    '"': r"\textquotedbl{}", "|": r"\textbar{}", "`": r"\textasciigrave{}",
    "±": r"$\pm$", "·": r"$\cdot$", "√": r"$\surd$",
    "\N{MINUS SIGN}": r"$-$", "\N{EN DASH}": "--", "\N{EM DASH}": "---",
}  # fmt: skip


def groups(columns: pd.MultiIndex) -> list[tuple[str, int]]:
    """Return the column groups from left to right, each with the number of its columns."""
    return [(group, len(list(names))) for group, names in groupby(columns, key=lambda column: column[0])]


def escape_markdown(text: str) -> str:
    """Escape text so that GitHub shows it literally."""
    text = re.sub(r"([\\`*|~#]|\](?=\())", r"\\\1", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def escape_latex(text: str) -> str:
    """Escape text so that LaTeX prints it literally; other signs outside Latin-1 become a question mark."""
    return "".join(_LATEX.get(letter, letter if ord(letter) < 256 else "?") for letter in text)


def markdown(frame: pd.DataFrame) -> str:
    """Return a GitHub table. A name that occurs in several groups is preceded by its group."""
    names = [name for _, name in frame.columns]
    head = [f"{SHORT.get(group, group)} {name}" if names.count(name) > 1 else name for group, name in frame.columns]
    rows = [[escape_markdown(cell) for cell in row] for row in frame.itertuples(index=False)]
    align = ["left" if is_left else "right" for is_left in _left(frame)]
    return tabulate(rows, map(escape_markdown, head), "pipe", colalign=align, headersalign=align, disable_numparse=True)


def latex(frame: pd.DataFrame, *, caption: str, label: str) -> str:
    """Return a table float in the style of booktabs, with a rule under each group of columns."""
    grouped = any(group for group, _ in groups(frame.columns))
    left = _left(frame)
    styler = (frame if grouped else frame.droplevel(0, axis=1)).style.hide(axis="index")
    source = styler.format(escape_latex).format_index(escape_latex, axis=1).to_latex(
        caption=escape_latex(caption),
        label=label,
        position="ht",
        position_float="centering",
        hrules=True,
        multicol_align="c",
        column_format=f"@{{}}{''.join('l' if is_left else 'r' for is_left in left)}@{{}}",
    )  # fmt: skip
    lines = source.rstrip().splitlines()
    lines[lines.index(r"\centering")] = "\\centering\\footnotesize\n\\setlength{\\tabcolsep}{3pt}"
    if grouped:
        rules, place = [], 1
        for group, width in groups(frame.columns):
            rules += [rf"\cmidrule(lr){{{place}-{place + width - 1}}}"] if group else []
            place += width
        lines.insert(lines.index(r"\toprule") + 2, "".join(rules))
    return "\n".join(lines)


def terminal(frame: pd.DataFrame, width: int, *, short: bool = False) -> str:
    """Return columns under their groups, separated by two blanks.

    This is our own layout, because tabulate and rich have no heading over several columns, and both pad narrow ones.

    Args:
        frame: the table.
        width: characters in a line; if long names do not fit, short ones are used.
        short: always use short names.
    """
    rows, left = frame.values.tolist(), _left(frame)
    for names in (SHORT,) if short else ({}, SHORT):
        head = [names.get(name, name) for _, name in frame.columns]
        widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
        banner, place = [], 0
        for group, count in groups(frame.columns):
            group, place = SHORT.get(group, group), place + count
            span = sum(widths[place - count : place]) + 2 * (count - 1)
            widths[place - 1] += max(0, len(group) - span)
            banner.append(f" {group} ".center(span, "-") if 0 < len(group) < span - 1 else group.ljust(span))
        if sum(widths) + 2 * (len(widths) - 1) <= width:
            break
    lines = ["  ".join(_align(row, widths, left)).rstrip() for row in [head, ["-" * width for width in widths], *rows]]
    return "\n".join(["  ".join(banner).rstrip(), *lines] if any(map(str.strip, banner)) else lines)


def run_list(frame: pd.DataFrame, width: int) -> str:
    """Return a list of runs for a terminal, with the long texts of the ``NOTED`` columns as numbered notes below it."""
    frame = frame.droplevel(0, axis=1)
    noted = [name for name in NOTED if name in frame.columns]
    texts = [". ".join(f"{name}: {row[name]}" for name in noted) for _, row in frame.iterrows()]
    numbers = {words: str(number) for number, words in enumerate(dict.fromkeys(texts), 1)}
    short = frame.drop(columns=[*noted, *IN_NOTES], errors="ignore").assign(note=[numbers[words] for words in texts])
    short.columns = pd.MultiIndex.from_product([[""], short.columns])
    notes = [wrap(f"{number.rjust(2)}  {words}", width, indent="    ") for words, number in numbers.items()]
    return "\n".join([terminal(short, width), *notes])


def wrap(line: str, width: int, *, indent: str = "") -> str:
    """Break the text into lines of at most ``width`` characters."""
    return textwrap.fill(line, width, subsequent_indent=indent, break_on_hyphens=False)


def _left(frame: pd.DataFrame) -> list[bool]:
    """Return True for each column that is aligned to the left."""
    return [name in LEFT for _, name in frame.columns]


def _align(row: list[str], widths: list[int], left: list[bool]) -> list[str]:
    cells = zip(row, widths, left, strict=True)
    return [cell.ljust(width) if is_left else cell.rjust(width) for cell, width, is_left in cells]
