"""Every relative link in the Markdown files leads to an existing file and an existing heading."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from properties.support.pages import ROOT

FOLDERS = ("docs", "reports")
FENCE = re.compile(r"^(```+|~~~+).*?^\1", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\((?:<([^>]*)>|([^)\s]*))[^)]*\)")
ADDRESS = re.compile(r"(?:https?|mailto):")


def pages() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and MyST make of a page's headings."""
    found: list[str] = []
    for heading in HEADING.findall(FENCE.sub("", text)):
        words = LINK.sub(lambda match: match[0][match[0].index("[") + 1 : match[0].index("]")], heading)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        same = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", other) is not None for other in found)
        found.append(f"{slug}-{same}" if same else slug)
    return set(found)


def leads_somewhere(link: str, text: str, page: Path) -> bool:
    """Return True if a link leads to a web address, or to an existing file and heading."""
    if ADDRESS.match(link) or not link:
        return bool(link)
    name, _, heading = unquote(link).partition("#")
    target = page.parent / name
    if name and heading:
        return target.is_file() and heading in anchors(target.read_text("utf-8"))
    return heading in anchors(text) if heading else target.exists()


def broken(text: str, page: Path) -> list[str]:
    """Return the links of a page's text that lead nowhere."""
    prose = CODE.sub("``", FENCE.sub("", text))
    links = [match[1] or match[2] or "" for match in LINK.finditer(prose)]
    return [link for link in links if not leads_somewhere(link, text, page)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert broken(page.read_text("utf-8"), page) == []


@pytest.mark.parametrize(
    "link",
    ["nothing.md", "#no-such-heading", "README.md#no-such-heading", "memcnn#heading", "", "docs/index.md#nothing"],
)
def test_a_broken_link_is_found(link):
    text = f"# The page\n\n[here]({link}), [page](#the-page), [code](memcnn), ![picture](docs/index.md#memcnn)\n"
    assert broken(text, ROOT / "page.md") == [link]


def test_headings_with_code_and_marks_have_the_anchors_that_renderers_make():
    assert anchors("# A `to_reversible(x)`: why?\n\n```\n# no heading\n```\n## Twice\n## Twice\n") == {
        "a-to_reversiblex-why",
        "twice",
        "twice-1",
    }
