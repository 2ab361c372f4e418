"""Run the commands of README and of each page of docs, in order, in a copy of the repository.

Long commands are left out or run only in ``tox -e long``; a table below lists them with the reason.
"""

import configparser
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest

from properties.support.commands import run, start
from properties.support.pages import PAGES, README, ROOT, commands, name_of, python_blocks

NOT_RUN = {
    r"tox|python -m pip|docker|mkdir|ruff": "installs, or needs a program that need not be there",
    r"(\w+=\S+ )?pytest (?!.*test_blocks)": "the tests themselves",
    r"torchrun|python -m memcnn\.train (?!.*(smoke|--list|--dry-run|--config))": "hours on a CPU",
    r"python -m bench\.reproduce_table --train": "hours on a CPU",
    r"python -m (bench|bench --quick|bench\.compare .*|bench\.gpu_day .*|bench --quick .*)$": "minutes",
    r"python examples/train_cifar.py": "downloads CIFAR-10; ``test_examples`` runs it on generated images",
    r"python examples/train_glow.py": "likewise",
    r"python -m bench\.gate|python -m memcnn\.convert|python -m properties\.": "needs files, or is long",
}
"""Patterns of commands that the walk leaves out, with the reason; their arguments are checked by ``test_pages``."""
STATUS = {("README.md", "memcnn.verify"): 1}
"""Commands whose exit status is not 0: the block that README verifies has a fault."""
README_ELSEWHERE = {
    "python -m pip install tox": ".ci/run does it, before it runs tox",
    "tox": ".ci/run does it: this test is a part of it",
    "tox -e table": "``test_tox_table`` below: 66 s to install and 122 s for twelve cells on two cores",
    "python -m pip install --constraint constraints.txt --editable .[harness]": "tox installs the same: 60 s",
}
"""README's commands that the walk leaves out, and where they run, with seconds measured on two cores."""
PARSER = configparser.ConfigParser(interpolation=None)
PARSER.read(ROOT / "tox.ini")


def runs(words: list[str]) -> bool:
    return not any(re.match(pattern, " ".join(words)) for pattern in NOT_RUN)


WALKED = [page for page in PAGES if any(map(runs, commands(page)))]


@pytest.fixture
def copy(tmp_path) -> Path:
    """Return a folder with a copy of what the commands need."""
    for name in ("memcnn", "bench", "reports", "examples", "docs", "README.md", "tox.ini"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a newcomer who has set nothing."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMCNN", "PYTEST"))}
    return {**kept, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def test_the_walk_leaves_out_nothing_that_is_quick():
    walked = [" ".join(words) for page in WALKED for words in commands(page) if runs(words)]
    assert len(walked) >= 12
    assert sum("memcnn.verify" in command for command in walked) >= 3


def test_each_command_of_readme_is_walked_or_run_elsewhere():
    left_out = {" ".join(words) for words in commands(README) if not runs(words)}
    assert left_out == set(README_ELSEWHERE)


def test_ci_runs_what_the_walk_leaves_to_it():
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert lines[-1] == "tox"
    assert any(re.search(r"-m pip install .*\btox$", line) for line in lines)
    install = next(words for words in commands(README) if "--editable" in words)
    tox = PARSER["testenv"]
    assert [tox["package"], tox["extras"], tox["constraints"]] == ["wheel", "harness", "constraints.txt"]
    assert install[4:] == ["--constraint", tox["constraints"], "--editable", f".[{tox['extras']}]"]


@pytest.mark.parametrize("page", WALKED, ids=name_of)
def test_walk(page, copy):
    for file, code in python_blocks(page):
        if file:
            (copy / file).write_text(code)
    for words in filter(runs, commands(page)):
        arguments = words[1:] if words[0] == "python" else ["-m", *words]
        done = run(*arguments, cwd=copy, env=environment(copy), timeout=900)
        expected = STATUS.get((name_of(page), words[2] if len(words) > 2 else ""), 0)
        assert done.returncode == expected, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr


def table_command() -> list[str]:
    """Return the arguments of Python in the command of ``tox -e table``, for somebody who has set no variable."""
    command = re.sub(r"\{env:\w+:([^}]*)\}", r"\1", PARSER["testenv:table"]["commands"]).replace("{posargs}", "")
    python, *arguments = shlex.split(command)
    assert python == "python"
    return arguments


def test_tox_table_begins_to_train_and_an_interrupt_leaves_a_table(copy):
    """The command of README up to its first cell; ``tox -e long`` trains all twelve."""
    output = copy / "output"
    process = start(*table_command(), cwd=copy, env=environment(copy), output=output, errors=copy / "errors")
    while process.exitcode is None:
        if output.exists() and "[ 1/12]" in output.read_text("utf-8"):
            os.kill(process.pid, signal.SIGINT)
            process.join(60)
        time.sleep(0.05)
    said = output.read_text("utf-8")
    assert process.exitcode == 3, (said, (copy / "errors").read_text("utf-8"))
    assert re.search(r"^\[ 1/12\] resnet32  cifar10  s0  accuracy .* complete \(generated data\)$", said, re.MULTILINE)
    assert "complete, stopped (interrupted); the same command resumes from here." in said
    assert (copy / "reports" / "out" / "table.html").exists()


def test_tox_table_trains_all_twelve_cells(copy):
    done = run(*table_command(), cwd=copy, env=environment(copy), timeout=1800)
    assert done.returncode == 0 and "12 of 12 cells complete" in done.stdout, done.stderr
    assert (copy / "reports" / "out" / "table.html").exists()
