"""A warning of memcnn names the user's line, whatever calls of memcnn and PyTorch lie in between."""

import _thread
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn, ones

import memcnn
from memcnn.attribution import warn_user
from memcnn.kernels.choice import Choices
from memcnn.kernels.operations import WEIGHT_GRADIENT

FILE = str(Path(memcnn.__file__).parent / "engine" / "made_up.py")
SOURCE = """
def warn(depth):
    if depth:
        warn(depth - 1)
    else:
        warn_user("planted", FutureWarning)
"""


def within_memcnn(depth: int, then: Callable[[], object] = lambda: None) -> Callable[..., object]:
    """Return a function of a file of memcnn that warns after ``depth`` further calls there, and calls ``then``."""
    names = {"warn_user": warn_user, "depth": depth, "then": then}
    exec(compile(f"{SOURCE}\ndef run(x=None):\n    warn(depth)\n    then()\n    return x", FILE, "exec"), names)
    return names["run"]


@pytest.mark.parametrize("depth", [0, 1, 5])
def test_the_line_that_calls_the_library_is_named(depth):
    run = within_memcnn(depth)
    with pytest.warns(FutureWarning, match="planted") as found:
        run()
    assert found[0].filename == __file__


def test_calls_of_pytorch_are_passed_over():
    module = nn.Identity()
    module.forward = within_memcnn(0)
    chain = nn.Sequential(nn.Sequential(module))
    with pytest.warns(FutureWarning, match="planted") as found:
        chain(ones(1))
    assert found[0].filename == __file__


def test_where_nobody_called_the_library_its_own_line_is_named():
    ended = threading.Event()

    def run_in_a_bare_thread() -> None:
        _thread.start_new_thread(within_memcnn(0, ended.set), ())
        assert ended.wait(10)

    with pytest.warns(FutureWarning, match="planted") as found:
        run_in_a_bare_thread()
    assert (found[0].filename, found[0].lineno) == (FILE, 1 + SOURCE.splitlines().index("    else:") + 1)


def test_without_triton_the_line_that_asks_for_a_plan_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "memcnn.kernels.weight_gradient", None)
    monkeypatch.delattr("memcnn.kernels.weight_gradient", raising=False)
    choices = Choices()
    with pytest.warns(
        RuntimeWarning, match="Our kernel for the weight gradient .* could not be tried.*ModuleNotFoundError"
    ) as found:
        assert choices.plan(WEIGHT_GRADIENT, ones(1, 16, 4, 4), ones(1, 16, 4, 4)) is None
    assert found[0].filename == __file__
    assert choices.plan(WEIGHT_GRADIENT, ones(1, 16, 4, 4), ones(1, 16, 4, 4)) is None  # warns once
    assert [measurement.chosen for measurement in choices.measured()] == ["library"]
