"""Every path and every ``python -m`` module that a text of the project names exists."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "memcnn", "properties", "reports")
FOLDERS = (*PACKAGES, "docker", "docs", "examples")
CREATED = ("docs/_build", "reports/out", "reports/bench/*/memory.csv")
"""Paths that only exist after a command has written them."""
PATH = re.compile(rf"(?<![\w./<>$-])(?:{'|'.join(FOLDERS)})/[\w./*<>{{}}$-]*")
MODULE = re.compile(rf"(?<!--)(?:python|torchrun) -m ((?:{'|'.join(PACKAGES)})(?:\.\w+)*)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
PLACEHOLDER = re.compile(r"[<>{}$]|\.\.\.")


def texts() -> list[Path]:
    """Return the project's Markdown pages, Python files, configuration files and Dockerfiles."""
    names = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "setup.py", "tox.ini", "ruff.toml"]
    found = [ROOT / name for name in names if (ROOT / name).is_file()]
    found += (ROOT / "docker").glob("Dockerfile*")
    for folder in FOLDERS:
        for suffix in ("md", "py"):
            found += (ROOT / folder).rglob(f"*.{suffix}")
    return sorted(path for path in found if not path.relative_to(ROOT).as_posix().startswith(CREATED))


def missing(text: str, folder: Path) -> list[str]:
    """Return the paths, modules and links in a text that do not exist; links are relative to ``folder``."""
    names = [name.rstrip("./") for name in PATH.findall(text) if not PLACEHOLDER.search(name)]
    found = [name for name in names if not name.startswith(CREATED) and not any(ROOT.glob(name))]
    found += [name for name in MODULE.findall(text) if find_spec(name) is None]
    return found + [link for link in LINK.findall(CODE.sub("", text)) if not (folder / link).exists()]


@pytest.mark.parametrize("path", texts(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_path_and_module_that_a_text_names_exists(path):
    text = path.read_text("utf-8")
    assert missing(text if path.suffix == ".md" else LINK.sub("", text), path.parent) == []


def test_a_missing_path_module_or_link_is_found():
    wrong = "bench/" + "nothing.py", "memcnn.nothing"
    there = "`bench/cases.py`, memcnn/engine/*.py, reports/bench/<device>/speed.csv, reports/out/page"
    text = f"{there}, `{wrong[0]}`. `python -m {wrong[1]}`, python -m bench.speed. [Here](nothing.md), `x[1](y)`."
    assert missing(text, ROOT / "properties") == [*wrong, "nothing.md"]
