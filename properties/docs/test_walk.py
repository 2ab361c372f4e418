"""A walk through README and docs: the quick commands of each page are run, in order, in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from properties.support.pages import PAGES, ROOT, commands, name_of, python_blocks

NOT_RUN = {
    r"tox|python -m pip|docker|mkdir|ruff": "installs, or needs a program that need not be there",
    r"(\w+=\S+ )?pytest (?!.*test_blocks)": "the tests themselves",
    r"torchrun|python -m memcnn\.train (?!.*(smoke|--list|--dry-run|--config))": "hours on a CPU",
    r"python -m bench\.reproduce_table --train": "hours on a CPU",
    r"python -m (bench|bench --quick|bench\.compare .*|bench\.gpu_day .*|bench --quick .*)$": "minutes",
    r"python -m bench\.gate|python -m memcnn\.convert|python -m properties\.": "needs files, or is long",
}
"""Patterns of commands that the walk leaves out, with the reason; their arguments are checked by ``test_pages``."""
STATUS = {("README.md", "memcnn.verify"): 1}
"""Commands whose exit status is not 0: the block that README verifies has a fault."""


def runs(words: list[str]) -> bool:
    return not any(re.match(pattern, " ".join(words)) for pattern in NOT_RUN)


WALKED = [page for page in PAGES if any(map(runs, commands(page)))]


def test_the_walk_leaves_out_nothing_that_is_quick():
    walked = [" ".join(words) for page in WALKED for words in commands(page) if runs(words)]
    assert len(walked) >= 12
    assert sum("memcnn.verify" in command for command in walked) >= 3


@pytest.mark.parametrize("page", WALKED, ids=name_of)
def test_walk(page, tmp_path):
    for name in ("memcnn", "bench", "reports", "examples", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    for file, code in python_blocks(page):
        if file:
            (tmp_path / file).write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for words in filter(runs, commands(page)):
        program = {"python": [sys.executable], "pytest": [sys.executable, "-m", "pytest"]}[words[0]]
        done = subprocess.run(
            [*program, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
        )
        expected = STATUS.get((name_of(page), words[2] if len(words) > 2 else ""), 0)
        assert done.returncode == expected, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr, done.stderr
