"""Settings of the documentation: ``tox -e docs`` builds it into docs/_build/html."""

import os
import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT))

from memcnn import __version__  # noqa: E402 - needs the path above

project, author = "MemCNN", "The MemCNN authors"
copyright = "the MemCNN authors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"MemCNN {release}"
html_show_sphinx = False
html_static_path, html_css_files = ["_static"], ["memcnn.css"]
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
copybutton_prompt_text = "$ "

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_use_unqualified_type_names = True
napoleon_google_docstring, napoleon_numpy_docstring = True, False

nitpicky = True
nitpick_ignore_regex = [
    # types of other projects, whose pages a build without a network cannot look up
    ("py:.*", r"(torch|nn|np|st|dist|hypothesis|collections|pathlib|argparse|weakref|types|functools|typing)\b.*"),
    ("py:.*", r"(Tensor|Module|Callable|Sequence|Iterable|Iterator|Mapping|Collection|SearchStrategy|Path|Any)"),
    ("py:.*", r"(Counter|device|dtype|Optimizer|Namespace|optional|TorchDispatchMode|FrameType)"),
    ("py:.*", r"memcnn\..*"),  # inner modules, which the reference does not show one by one
    ("py:exc", r"BadArgument|BadCheckpoint|MixedExecution|FolderBusy|CannotWrite|distributed\.ProcessLost"),
    ("py:class", r".* .*"),  # words before a colon in a property's docstring, which napoleon takes for a type
]
linkcheck_anchors = False

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "reports/activations.md": "results/activations.md",
    "reports/bench/README.md": "results/devices.md",
    "reports/bench/cpu/speed.md": "results/speed.md",
    "reports/bench/cpu/summary.md": "results/cpu.md",
    "reports/bench/nvidia-h200/speed.md": "results/h200-speed.md",
    "reports/bench/nvidia-h200/summary.md": "results/h200.md",
    "reports/faults.md": "results/faults.md",
    "reports/findings.md": "results/findings.md",
    "reports/mutation.md": "results/mutation.md",
    "reports/peers.md": "results/peers.md",
    "reports/zoo.md": "results/zoo.md",
}
"""Pages of the repository that the documentation shows, and where it shows them."""
INCLUDE = re.compile(r"```\{include\} (\S+)\n```\n?")
LINK = re.compile(r"(\]\()(?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?(?=\))")


def included(text: str, page: Path) -> str:
    """Return the source of a page with the files that it includes, and with links that hold where the page stands."""
    parts, end = [], 0
    for match in INCLUDE.finditer(text):
        source = (page.parent / match[1]).resolve()
        parts += [rewritten(text[end : match.start()], page.parent, page.parent)]
        parts += [rewritten(source.read_text("utf-8"), source.parent, page.parent)]
        end = match.end()
    return "".join([*parts, rewritten(text[end:], page.parent, page.parent)])


def rewritten(text: str, here: Path, there: Path) -> str:
    """Return Markdown with its relative links, written for the folder ``here``, as they must be in ``there``."""

    def link(match: re.Match) -> str:
        target = (here / match[2]).resolve()
        shown = PAGES.get(target.relative_to(ROOT).as_posix()) if target.is_relative_to(ROOT) else None
        if target.is_dir():
            target = next((target / name for name in ("README.md", "__init__.py") if (target / name).is_file()), target)
        if target.is_dir():  # a folder without a page of its own: there is nothing to show
            return f"{match[1]}#"
        path = os.path.relpath(DOCS / shown if shown else target, there)
        return f"{match[1]}{Path(path).as_posix()}{match[3] or '' if shown or target.suffix == '.md' else ''}"

    return LINK.sub(link, text)


def _read(app: object, name: str, source: list[str]) -> None:
    path = DOCS / f"{name}.md"
    if path.is_file():
        source[0] = included(source[0], path)


def setup(app: object) -> None:
    """Expand the included pages before MyST reads them."""
    app.connect("source-read", _read)
