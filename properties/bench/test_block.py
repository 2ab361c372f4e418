"""A user's own block in the benchmark: its cases, their measurements, and its page."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import memcnn
from bench import __main__ as command
from bench import block, measure, report, result
from memcnn.cli import Misuse
from properties.support.results import measured, row, written

CPU = torch.device("cpu")
SHAPE = (2, 4, 8, 8)
BLOCKS = """
import torch
from torch import nn
import memcnn

def coupling():
    return memcnn.AdditiveCoupling(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 2, 1)))

def wrapped():
    return memcnn.InvertibleModuleWrapper(coupling(), keep_input=True)

class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = wrapped()
    def forward(self, x):
        return self.inner(x) + 1

class Backward(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
    def forward(self, x):
        return x * self.weight
    def inverse(self, y):
        raise ArithmeticError("no inverse")
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Return a function that names a factory in the file of blocks."""
    path = tmp_path / "blocks_of_a_user.py"
    path.write_text(BLOCKS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    block.factory.cache_clear()
    yield lambda name: f"{path}:{name}"
    block.factory.cache_clear()


def by_subject(target: str, depth: int) -> dict[str, block.Block]:
    """Return the cases of one depth by subject."""
    return {case.subject: case for case in block.cases(target, SHAPE, [depth])}


def test_a_block_is_wrapped_unless_it_contains_a_wrapper(target):
    assert isinstance(block.make_block(target("coupling")), memcnn.InvertibleModuleWrapper)
    assert block.make_block(target("wrapped")).keep_input, "as it is wrapped"
    assert type(block.make_block(target("Around"))).__name__ == "Around"


def test_every_subject_computes_the_same_gradients(target):
    found = {}
    for subject, case in by_subject(target("coupling"), 3).items():
        model = case.model(CPU)
        case.step(model, CPU).run()
        found[subject] = [parameter.grad for parameter in model.parameters()]
    assert set(found) == {"plain", "checkpoint", "wrapped", "reversible"}
    for gradients in found.values():
        torch.testing.assert_close(gradients, found["plain"])


def test_memory_grows_with_depth_under_plain_autograd_and_not_as_wrapped(target):
    peaks = {
        (subject, depth): measure.memory(case, CPU)["activation_bytes"]
        for depth in (2, 8)
        for subject, case in by_subject(target("coupling"), depth).items()
    }
    assert peaks["plain", 8] > 2.5 * peaks["plain", 2]
    assert peaks["reversible", 8] == peaks["reversible", 2] < peaks["plain", 2]
    assert peaks["plain", 8] > peaks["checkpoint", 8] > peaks["reversible", 8]
    counted = {subject: measure.evaluations(case, CPU) for subject, case in by_subject(target("coupling"), 2).items()}
    assert {name: one["evaluations"] / one["branches"] for name, one in counted.items()} == {
        "plain": 1, "checkpoint": 2, "wrapped": 2, "reversible": 2,
    }  # fmt: skip


def test_a_block_without_inverse_around_a_wrapped_one_is_measured_as_it_is(target):
    assert set(by_subject(target("Around"), 2)) == {"plain", "checkpoint", "wrapped"}


def test_a_block_whose_wrapped_form_cannot_train_is_refused(target):
    block.check(target("coupling"), SHAPE, CPU)
    with pytest.raises(Misuse, match="the backward pass of the wrapped block raised ArithmeticError: no inverse; see"):
        block.check(target("Backward"), SHAPE, CPU)


def test_the_page_is_that_of_the_projects_own_chains(target, tmp_path):
    rows = []
    for depth in (1, 2):
        for case in block.cases(target("coupling"), SHAPE, [depth]):
            rows += [measured(case), row("time", case, 1.0 if case.subject == "plain" else 1.4, repeat=0)]
    results = result.load(written(tmp_path / "own.json", rows))
    report.write(results, tmp_path / "out", "python -m bench.report", results_folder=tmp_path)
    page = (tmp_path / "out" / "page.html").read_text("utf-8")
    assert f"What reversibility costs and saves in {target('coupling')}" in page
    assert "input 2 x 4 x 8 x 8, float32" in page and "time / plain, 2 blocks" in page
    assert "Beside other packages" not in page and not (tmp_path / "out" / "history.csv").exists()


def test_the_command_passes_block_shape_and_depths_to_the_suite(target, tmp_path):
    seen = []
    with patch.object(command.pytest, "main", lambda words: seen.extend(words) or 0):
        words = ["--block", target("coupling"), "--shape", "2,4,8,8", "--out", str(tmp_path / "out"), "--quick"]
        assert command.main(words) == 0
    assert f"--block={target('coupling')}" in seen and "--shape=2,4,8,8" in seen and "--depths=1,4,8" in seen


def test_an_expression_that_selects_no_case_is_reported_and_leaves_no_file(tmp_path, capsys):
    def nothing(words):
        (path,) = [Path(word.partition("=")[2]) for word in words if word.startswith("--benchmark-json")]
        path.touch()  # as pytest-benchmark does before it knows whether there is a case
        return command.pytest.ExitCode.NO_TESTS_COLLECTED

    with patch.object(command.pytest, "main", nothing), pytest.raises(SystemExit) as end:
        command.main(["-k", "nothing", "--out", str(tmp_path / "out")])
    assert end.value.code == 2
    assert "argument -k: got 'nothing', which selects no case" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())
