"""A mutant is what its tests import, and the tests of a line are those that execute its statement."""

import importlib
import os
from collections import Counter

import pytest

from properties.mutation import selection

SOURCE = """\
LIMIT = 3
def clipped(x):
    return min(
        x,
        LIMIT,
    )
"""
RECORDED = {"seconds": {"a": 2.0, "b": 1.0, "c": 0.5}, "tests": {"file.py": {1: ["a", "c"], 3: ["a"], 5: ["b"]}}}


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_fork_imports_the_project_from_the_folder_in_which_it_starts(tmp_path, monkeypatch):
    importlib.import_module("memcnn.cli")  # as the command itself does, from the folder without mutations
    package = tmp_path / "memcnn"
    package.mkdir()
    for name, text in (("__init__.py", ""), ("cli.py", "VALUE = 7\n")):
        (package / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    status, output = selection.in_a_fork(lambda: getattr(importlib.import_module("memcnn.cli"), "VALUE", 0))
    assert os.waitstatus_to_exitcode(status) == 7, output


def test_tests_of_a_line_execute_its_statement_and_killers_come_first():
    assert selection.tests_of("file.py", SOURCE, 4, RECORDED, Counter()) == ["b", "a"]
    assert selection.tests_of("file.py", SOURCE, 4, RECORDED, Counter(a=1)) == ["a", "b"]
    assert selection.tests_of("file.py", SOURCE, 1, RECORDED, Counter()) == ["c", "b", "a"]  # executed by the import


def test_the_quickest_tests_fit_into_the_seconds_but_one_always_runs():
    assert selection.quickest(["c", "b", "a"], RECORDED["seconds"], 1.5) == ["c", "b"]
    assert selection.quickest(["a"], RECORDED["seconds"], 0.1) == ["a"]
