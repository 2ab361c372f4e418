"""The Markdown pages that a user reads, with their Python blocks and shell commands."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYTHON = re.compile(r"([^\n]*)\n\n```python\n(.*?)```", re.DOTALL)
SHELL = re.compile(r"```bash\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:python -m (?:memcnn|bench|properties|reports)|python examples/|tox)\b[^`\n]*)`")
FILE = re.compile(r"\bin `(\w+\.py)`")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[tuple[str | None, str]]:
    """Return (file, code) of each Python block; the sentence before a block may name its file, otherwise None."""
    blocks = []
    for sentence, code in PYTHON.findall(page.read_text("utf-8")):
        file = FILE.search(sentence)
        blocks.append((file[1] if file else None, code))
    return blocks


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command in the shell blocks of a page, in order, without comments."""
    lines = "\n".join(SHELL.findall(page.read_text("utf-8"))).replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.partition("  #")[0].split("&&")]
    return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


def mentioned(page: Path) -> list[list[str]]:
    """Return the words of each command that a page mentions within a sentence or a table."""
    return [shlex.split(text) for text in INLINE.findall(page.read_text("utf-8"))]
