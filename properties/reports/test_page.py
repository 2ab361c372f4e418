"""One generator makes every page: its sections, its lists and its pictures as HTML and as Markdown."""

import re
from pathlib import Path

import pandas as pd
import pytest

from memcnn.needs import INSTALL
from reports import page
from reports.page import Figure, Page, Section

SVG = """<?xml version="1.0"?>
<svg width="10pt" height="20pt"><metadata>made today</metadata><g id="unused"><path id="a" d="M0 0"/>
<use xlink:href="#a" style="fill: url(#b); stroke: #abcdef"/><pattern id="b"/></g></svg>"""


def frame(**columns) -> pd.DataFrame:
    return page.text_frame(pd.DataFrame(columns))


def test_numbers_become_text_and_what_is_missing_a_dash():
    made = frame(**{"": ["a", "b"], "x": [1234567.0, None], "4": ["1 [2, 3]", "text"]})
    assert made.values.tolist() == [["a", "1.23457e+06", "1 [2, 3]"], ["b", "—", "text"]]
    assert list(made.columns) == [("", ""), ("", "x"), ("", "4")]
    assert list(page.text_frame(pd.DataFrame({8: [1]})).columns) == [("", "8")]


def test_two_pictures_of_a_page_share_no_name_and_keep_their_references():
    source = page.html(Page("t", [Section("s", figures=[Figure("one", SVG), Figure("two", SVG)])]))
    names = re.findall(r'id="([^"]*)"', source)
    assert len(names) == len(set(names)) == 4
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', source)) == set(names)
    assert source.count("#abcdef") == 2 and "made today" not in source and "10pt" not in source
    assert re.findall("<figcaption>(.*)</figcaption>", source) == ["one", "two"]


def test_a_single_picture_has_no_caption_besides_its_heading():
    assert "figcaption>" not in page.html(Page("t", [Section("s", figures=[Figure("one", SVG)])]))


def test_markdown_links_pictures_and_leaves_out_cards_and_pictures_without_a_file():
    sections = [
        Section("Table", note="A note.", table=frame(model=["a"], n=[3]), notes=["x | y"], command="go"),
        Section("Cards", cards=[("a", frame(model=["hidden"]))]),
        Section("Pictures", figures=[Figure("one", SVG, "figures/one.svg"), Figure("two", SVG)]),
    ]
    source = page.markdown(Page("Title", sections, summary=["S."], origin=["O1", "O2"], commands=["a", "b"]))
    assert source.startswith("# Title\n\nMade by `a`, then `b`.\n\n* O1\n* O2\n\nS.\n\n## Table\n\nA note.\n\n|")
    assert "* x \\| y" in source and f"```sh\n{INSTALL}\ngo\n```" in source
    assert "hidden" not in source and "Cards" not in source
    assert "![one](figures/one.svg)" in source and "two" not in source


def test_what_stands_between_backticks_in_a_note_is_code_and_all_else_is_escaped():
    source = page.html(Page("Title", [Section("s", note="`a < b` & <b>", notes=["see `go`"])]))
    assert "<code>a &lt; b</code> &amp; &lt;b&gt;" in source and "see <code>go</code>" in source


def test_a_rows_files_stand_beside_its_name():
    table, links = (
        frame(model=["a", "b"], n=[3, 4]),
        [[("record", "a.json")], [("record", "b.json"), ("curve", "b.csv")]],
    )
    source = re.sub(r"\s+", " ", page.html(Page("Title", [Section("Runs", table=table, links=links)])))
    assert '</th> <th scope="col" class="left">files</th> <th' in source
    assert '<th scope="row">a</th> <td class="left"><a href="a.json">record</a></td> <td' in source
    assert '<a href="b.json">record</a> <a href="b.csv">curve</a></td>' in source


@pytest.mark.parametrize(("lines", "tag"), [(["one"], "p"), (["one", "two"], "ul"), ([], None)])
def test_one_line_is_a_paragraph_and_several_are_a_list(lines, tag):
    source = page.html(Page("t", [], summary=lines))
    assert re.findall(r'<(\w+) class="summary"', source) == ([tag] if tag else [])


def test_a_wide_section_gives_way_to_cards_on_a_narrow_screen():
    table = frame(model=["a"])
    source = page.html(Page("t", [Section("Wide", table=table, wide=True), Section("Narrow", cards=[("a", table)])]))
    assert re.findall(r"<section([^>]*)>\s*<h2>(\w+)", source) == [
        (' class="wide"', "Wide"),
        (' class="cards"', "Narrow"),
    ]
    narrow = source[source.index("@media (max-width") :]
    assert ".wide { display: none; }" in narrow and ".cards { display: block; }" in narrow


def test_a_cell_says_by_its_class_what_it_is():
    table = frame(model=["a"], verdict=["not enough runs"], time=["4 min 03 s"], x=[None], device=["a long name"])
    source = page.html(Page("t", [Section("s", table=table)]))
    cells = re.findall(r"<td(?: class=\"([^\"]*)\")?>([^<]*)<", source)
    assert cells == [
        ("left not-enough-runs", "not enough runs"),
        ("", "4\N{NO-BREAK SPACE}min\N{NO-BREAK SPACE}03\N{NO-BREAK SPACE}s"),
        ("none", "—"),
        ("left prose", "a long name"),
    ]


def test_only_data_and_the_pictures_of_the_docs_are_committed():
    root = Path(page.__file__).parent
    rendered = [path.relative_to(root) for path in root.rglob("*") if path.suffix in (".png", ".html")]
    assert [path for path in rendered if path.parts[0] != "out"] == [Path("page.html")]
