"""Choose the tests of a mutated line, and run them in a new process until one fails."""

import ast
import os
import re
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import hypothesis.extra.pytestplugin  # noqa: F401  imported here so that forked processes need not do it again
import pytest
import torch._dynamo  # noqa: F401

PROJECT = {"memcnn", "reports", "bench", "properties"}
START = Path.cwd()
"""The folder in which the command was started: it holds the code without mutations."""

FIRST_BATCH = 25
"""Number of tests that are collected and run before all others are collected."""

OPTIONS = ["-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
"""Options of every run of pytest here. The ignored warning says that hypothesis is imported already, as intended."""

MOST_BYTES = 64 << 30
"""Limit of the address space, which stops a mutant that allocates without end."""

LEAST_LIMIT_S, STARVED_S = 10.0, 1800
"""A test may take ten times its usual processor time, or the first of these if that is more; and STARVED_S in all."""


def tests_of(file: str, source: str, line: int, recorded: dict, kills: Counter) -> list[str]:
    """Return the tests that execute the statement around a line. Those that have found most mutants come first.

    Args:
        file: the path of the file as ``recorded`` has it.
        source: its text.
        line: the number of the line.
        recorded: the tests of each line, and the seconds of each test; see ``coverage_map``.
        kills: the number of mutants that each test has found.
    """
    lines = statement_lines(source, line)
    executing = {test for number, tests in recorded["tests"][file].items() if number in lines for test in tests}
    return sorted(executing, key=lambda test: (-kills[test], recorded["seconds"][test]))


def quickest(tests: list[str], computing: dict[str, float], seconds: float) -> list[str]:
    """Return the first ``tests`` that take at most ``seconds`` of processor time together; at least one."""
    until = accumulate(computing[test] for test in tests)
    return tests[: max(1, sum(total <= seconds for total in until))]


def statement_lines(source: str, line: int) -> range:
    """Return the lines of the smallest statement around ``line``, or of the whole file outside of functions."""
    around = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt) and line in _lines(node)]
    if not any(isinstance(node, ast.FunctionDef) for node in around):
        return range(1, 1 + source.count("\n"))
    return _lines(min(around, key=lambda node: len(_lines(node))))


def _lines(node: ast.stmt) -> range:
    first = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
    return range(first, node.end_lineno + 1)


def in_a_fork(function: Callable[[], int | None]) -> tuple[int, str]:
    """Call ``function`` in a forked process, which has not imported this project.

    Returns:
        The exit status (0 for None) and the end of the output.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        if (process := os.fork()) == 0:
            status = 70
            try:
                for stream in (1, 2):
                    os.dup2(output.fileno(), stream)
                forget_project()
                status = int(function() or 0)
            except BaseException as error:
                print(error)
            finally:
                sys.stdout.flush()
                os._exit(status)
        _, status = os.waitpid(process, 0)
        output.seek(0)
        return status, output.read()[-2000:]


def forget_project() -> None:
    """Forget the modules of this project, so that tests import them, mutated, from the current folder."""
    for name in [name for name in sys.modules if name.partition(".")[0] in PROJECT]:
        del sys.modules[name]
    sys.path[:] = [str(Path.cwd()), *(path for path in sys.path if path not in ("", str(START)))]


def failing(tests: list[str], seconds: dict[str, float]) -> tuple[bool, str]:
    """Return whether one of ``tests`` fails or does not end in this folder, and the end of pytest's output."""
    status, output = in_a_fork(lambda: _run(tests, seconds))
    if (os.WIFEXITED(status) and os.WEXITSTATUS(status) == 70) or "ERROR: not found:" in output:
        raise RuntimeError(f"{output}\nThe tests were not run: if they have changed, remove build/mutation")
    return status != 0, output


def failed_test(output: str) -> str | None:
    found = re.search(r"^(?:FAILED|ERROR) (properties/.+?)(?: - .*)?$", output, re.MULTILINE)
    return found and found[1]


class TimeLimit:
    """A pytest plugin that ends the process if a test computes for much longer than without the mutation."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        signal.setitimer(signal.ITIMER_PROF, max(LEAST_LIMIT_S, 10 * self.seconds[nodeid]))


def _run(tests: list[str], seconds: dict[str, float]) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    # Python would use the bytecode of another mutant that was written in the same second
    sys.dont_write_bytecode = True
    options = [
        *OPTIONS,
        "-x",
        "--no-header",
        "--tb=line",
        "-o",
        f"faulthandler_timeout={STARVED_S}",
        "-o",
        "faulthandler_exit_on_timeout=true",
    ]
    status = 0
    for batch in (tests[:FIRST_BATCH], tests[FIRST_BATCH:]):
        if batch and not status:
            status = pytest.main([*options, *batch], plugins=[TimeLimit(seconds)])
    return status
