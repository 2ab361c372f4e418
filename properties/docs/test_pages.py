"""README and docs: every Python block runs as it stands, and the parser of every command accepts its options."""

import argparse
import configparser
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import memcnn
from memcnn import cli
from properties.support.commands import run
from properties.support.pages import PAGES, README, ROOT, commands, mentioned, name_of, python_blocks
from reports.readme import BEGIN, END

VERIFY = ROOT / "docs" / "howto" / "verify.md"
WRONG, RIGHT = "y1 + self.f(y2).relu()", "y1 - self.f(y2).relu()"
OTHERS = {"cd", "docker", "mkdir", "pip", "pytest", "ruff"}
"""Programs whose arguments are not checked here. Paths among them are checked by ``test_paths``."""


class Parsed(Exception):
    """Raised when a command's parser has accepted the arguments, in place of the command's work."""


def refusal(words: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return why a command cannot run as it is written, or an empty text."""
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if words[0] == "torchrun":
        words = ["python", *words[words.index("-m") :]]
    if words[0] == "tox":
        return _tox_refusal(words)
    if words[:2] == ["python", "-m"] and words[2] != "pip":
        return _python_refusal(words[2], words[3:], monkeypatch)
    if words[0] == "python":
        return "" if words[1] == "-m" or (ROOT / words[1]).is_file() else f"there is no {words[1]}"
    return "" if words[0] in OTHERS else f"unknown command {words[0]}: check it here, or add it to OTHERS"


def _tox_refusal(words: list[str]) -> str:
    known = configparser.ConfigParser(interpolation=None)
    known.read(ROOT / "tox.ini")
    wanted = words[words.index("-e") + 1].split(",") if "-e" in words else []
    return "".join(f"no environment {name}" for name in wanted if f"testenv:{name}" not in known)


def stopping_after(parse: Callable) -> Callable:
    """Return ``parse`` with an exception at its end, so that the command does no work."""

    def parse_and_stop(self, given=None, namespace=None):
        parse(self, given, namespace)
        raise Parsed

    return parse_and_stop


def _python_refusal(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a module up to the point where its parser has read the arguments."""
    if not module.startswith(("memcnn", "bench", "properties", "reports")):
        return ""
    for parser in (argparse.ArgumentParser, cli.Parser):
        monkeypatch.setattr(parser, "parse_args", stopping_after(parser.parse_args))
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    errors, output = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
            runpy.run_module(module, run_name="__main__", alter_sys=False)
    except Parsed:
        return ""
    except SystemExit as stop:
        return errors.buffer.getvalue().decode() or f"{module} ended with status {stop.code}"
    finally:
        monkeypatch.undo()
    return f"{module} has no parser"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_accepted(page, monkeypatch):
    wrong = {}
    for words in [*commands(page), *mentioned(page)]:
        if words[:2] == ["python", "-m"] and len(words) == 3 and find_spec(words[2]):  # named without arguments
            continue
        if "NAME" in words:  # stands for a name that does not exist yet
            continue
        if reason := refusal(words, monkeypatch):
            wrong[" ".join(words)] = reason
    assert wrong == {}


@pytest.mark.parametrize(
    "command",
    [
        "python -m memcnn.train revnet39 cifar10",
        "python -m bench --slow",
        "tox -e nothing",
        "python examples" + "/none.py",
    ],
)
def test_a_wrong_command_is_refused(command, monkeypatch):
    assert refusal(command.split(), monkeypatch)


# the compiler of PyTorch 2.14 asks every tensor that it is given for its gradient, also those that cannot have one
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_every_python_block_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    files, names = [], {"__name__": "page"}
    try:
        for file, code in python_blocks(page):
            if file:
                (tmp_path / file).write_text(code)
                files.append(Path(file).stem)
            exec(compile(code, name_of(page), "exec"), names)
    finally:
        for module in files:
            sys.modules.pop(module, None)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_line_of_a_block_is_wider_than_its_page(page):
    """The documentation shows 90 columns of code, and a comment beyond them is not seen."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 90] == []


def run_shown_tests(folder: Path, block: str, *options: str) -> subprocess.CompletedProcess:
    """Run the tests that the page on verification shows, as a user would, on a version of its block.

    Two drawn branches are enough here: the walk through the page draws all 20, and ``properties/laws`` many more.
    """
    shown = dict(python_blocks(VERIFY))["test_blocks.py"]
    assert shown.count("max_examples=20") == 1
    (folder / "blocks.py").write_text(block)
    (folder / "test_blocks.py").write_text(shown.replace("max_examples=20", "max_examples=2"))
    command = ["-m", "pytest", "-q", "-p", "memcnn.testing.plugin", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run(*command, cwd=folder, env=environment)


def test_the_shown_tests_pass_and_catch_the_planted_fault_of_readme(tmp_path):
    (faulty,) = (code for _, code in python_blocks(README) if WRONG in code)
    assert dict(python_blocks(VERIFY))["blocks.py"] == faulty.replace(WRONG, RIGHT).replace("  # wrong: the sign", "")
    done = run_shown_tests(tmp_path, faulty.replace(WRONG, RIGHT))
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    done = run_shown_tests(tmp_path, faulty, "-k", "my_block")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


def test_readme_is_read_in_three_minutes():
    text = README.read_text("utf-8")
    generated = text[text.index(BEGIN) : text.index(END)]
    assert len(text.replace(generated, "").split()) <= 750, "words beside the generated table"


@pytest.mark.parametrize(
    "wanted",
    ["memcnn/engine/second.py", "properties/laws/test_gradients.py", "CONTRIBUTING.md#add-a-coupling",
     "memcnn/training/record.schema.json", "docs/index.md"],
)  # fmt: skip
def test_readme_leads_to_what_newcomers_look_for(wanted):
    assert f"]({wanted})" in README.read_text("utf-8")


def test_the_citation_names_this_version():
    lines = (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    assert f"version: {memcnn.__version__}" in lines
