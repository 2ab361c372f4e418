"""The command `python -m memcnn.verify` and the fixture `assert_reversible`, used as a newcomer would."""

import json
import re
import sys
from pathlib import Path

import pytest

from memcnn import verify
from properties.support import commands

BLOCKS = """
import torch
from torch import nn

class Block(nn.Module):
    sign, scale = -1, 1

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())
        self.g = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh())

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.scale * self.f(x2)
        return torch.cat([y1, x2 + self.scale * self.g(y1)], 1)

    def inverse(self, y):
        y1, y2 = y.chunk(2, 1)
        x2 = y2 - self.scale * self.g(y1)
        return torch.cat([y1 + self.sign * self.scale * self.f(x2), x2], 1)

class Flipped(Block):
    sign = 1

class InEvalAlone(Block):
    @property
    def sign(self):
        return 1 if self.training else -1

class InLargeSteps(Block):
    scale = 1000.0

class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x + 0

    @staticmethod
    def backward(ctx, gradient):
        return 1.9 * gradient

class Scaled(Block):
    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        weight = WrongGradient.apply(self.g[0].weight)
        return torch.cat([y1, x2 + torch.conv2d(y1, weight, self.g[0].bias, padding=1).tanh()], 1)

class RolledBack(Block):
    # the inverse rolls the batch the wrong way, which a batch of two does not show
    def forward(self, x):
        return super().forward(x).roll(1, 0)

    def inverse(self, y):
        return super().inverse(y.roll(1, 0))

class Raising(Block):
    def inverse(self, y):
        raise KeyError("lost")

class Conditional(Block):
    sign = -1

    def forward(self, x, i):
        return super().forward(x) * (1 + i.view(-1, 1, 1, 1))

    def inverse(self, y, i):
        return super().inverse(y / (1 + i.view(-1, 1, 1, 1)))

class ForwardOnlyInTraining(Block):
    def forward(self, x):
        if not self.training:
            raise KeyError("no statistics")
        return super().forward(x)

class Half(nn.Module):
    def forward(self, x):
        return x

ready = Block()
def broken():
    raise OSError("no weights here")
"""

ENVIRONMENT = {"PYTHONPATH": ":".join(["", *sys.path]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def blocks(tmp_path, monkeypatch) -> Path:
    """The current folder, which holds a user's module ``user_blocks``."""
    (tmp_path / "user_blocks.py").write_text(BLOCKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("user_blocks", None)
    return tmp_path


def run(capsys, target: str, *arguments: str, shape: str = "2,4,4,4") -> tuple[int, str, str]:
    try:
        status = verify.main([target, "--shape", shape, "--examples", "4", *arguments])
    except SystemExit as exit:  # the parser refuses an argument
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("target", ["user_blocks:Block", "user_blocks.py:Block", "user_blocks:ready"])
def test_a_right_block_passes_every_law(blocks, capsys, target):
    status, out, _ = run(capsys, target)
    assert status == 0
    assert "FAIL" not in out and "PASS: all laws hold: inverse, gradients, state, memory" in out


def test_a_wrong_inverse_is_reported_with_the_smallest_example(blocks, capsys):
    status, out, _ = run(capsys, "user_blocks:Flipped", "--vary", "0,2,3", "--laws", "inverse")
    assert status == 1
    assert "only in the first half along dimension 1" in out
    assert "torch.randn([1, 4, 1, 1]" in out


def test_the_example_runs_when_pasted_and_fails_as_reported(blocks, capsys):
    _, out, _ = run(capsys, "user_blocks:Flipped", "--vary", "0,2,3", "--laws", "inverse")
    code = "\n".join(line[4:] for line in out.partition("breaks the law of inverse:\n")[2].splitlines())
    pasted = commands.run("-c", code, cwd=blocks, env=ENVIRONMENT)
    assert "FAIL  inverse" in pasted.stdout and "only in the first half along dimension 1" in pasted.stdout


def test_a_block_right_in_eval_mode_alone_fails_in_training_mode(blocks, capsys):
    assert run(capsys, "user_blocks:InEvalAlone", "--mode", "eval")[0] == 0
    status, out, _ = run(capsys, "user_blocks:InEvalAlone", "--laws", "inverse")
    assert status == 1
    assert "in eval mode it is right" in out and ".train()" in out


def test_a_wrong_gradient_is_reported_with_its_factor(blocks, capsys):
    status, out, _ = run(capsys, "user_blocks:Scaled", "--laws", "inverse,gradients")
    assert status == 1
    assert re.search(r"FAIL: the inverse is right, but the gradient of g.0.weight is 1.9 times", out)


def test_bad_conditioning_is_no_fault_but_is_reported(blocks, capsys):
    status, out, _ = run(capsys, "user_blocks:InLargeSteps", "--laws", "inverse")
    assert status == 0
    assert re.search(r"right, but badly conditioned: .*float32 (fails|the inverse)", out)


def test_the_json_file_holds_all_results(blocks, capsys):
    status, out, _ = run(capsys, "user_blocks:Flipped", "--json", "found.json", "--laws", "inverse,state")
    found = json.loads((blocks / "found.json").read_text())
    assert status == 1 and found["passed"] is False
    assert {result["verdict"] for result in found["results"] if result["law"] == "state"} == {"PASS"}
    assert all(result["error"] > result["limit"] for result in found["results"] if result["verdict"] == "FAIL")
    assert set(found["smallest failing"]) == {"inverse"} and found["summary"] in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["user_blocks"], "wanted package.module:factory"),
        (["nowhere:make"], "cannot import nowhere"),
        (["nowhere.py:make"], "there is no file nowhere.py"),
        (["user_blocks:make"], "has no attribute 'make'"),
        (["user_blocks:BLOCK_COUNT"], "has no attribute"),
        (["user_blocks:broken"], "making the module raised OSError: no weights here"),
        (["user_blocks:Half"], "an nn.Module with forward and inverse: got Half; give it an inverse method"),
        (
            ["user_blocks:Block", "--laws", "inversion"],
            "got inversion, wanted some of inverse, gradients, state, memory, log_det",
        ),
        (["user_blocks:Block", "--examples", "0"], "got '0', wanted a whole number of at least 1"),
        (["user_blocks:Block", "--device", "abacus"], "got 'abacus', which this torch cannot use"),
        (
            ["user_blocks:Block", "--json", "nowhere/found.json"],
            "got 'nowhere/found.json', wanted a file in a folder that exists: create the folder first",
        ),
        (["user_blocks:Block", "--laws", "log_det"], "Block has none"),
        (["user_blocks:Block", "--vary", "7"], "got dimension 7, but the inputs have 4 dimensions; choose from 0 to 3"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_reported_with_status_2(blocks, capsys, arguments, message):
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err


def test_a_shape_that_does_not_fit_is_misuse(blocks, capsys):
    status, _, err = run(capsys, "user_blocks:Block", shape="2,3,4,4")
    assert status == 2
    assert "forward raised RuntimeError for inputs of shape (2, 3, 4, 4)" in err


def test_sizes_above_the_given_ones_are_tried(blocks, capsys):
    status, out, _ = run(capsys, "user_blocks:RolledBack", "--vary", "0", "--laws", "inverse", "--examples", "2")
    assert status == 1
    assert "torch.randn([3, 4, 4, 4]" in out or "torch.randn([5, 4, 4, 4]" in out, out
    assert run(capsys, "user_blocks:RolledBack", "--laws", "inverse", "--examples", "2")[0] == 0


def test_an_exception_of_the_block_is_a_failure_that_names_it(blocks, capsys):
    status, out, err = run(capsys, "user_blocks:Raising", "--examples", "2")
    assert status == 1
    assert "inverse raised KeyError: 'lost'" in out and "Traceback" not in out + err


def test_a_forward_that_raises_in_one_mode_is_a_failure(blocks, capsys):
    status, out, _ = run(capsys, "user_blocks:ForwardOnlyInTraining", "--laws", "inverse", "--examples", "2")
    assert status == 1
    assert "in eval mode forward raised KeyError" in out


def test_a_fault_of_the_verifier_has_a_status_of_its_own(blocks, capsys, monkeypatch):
    monkeypatch.setattr("memcnn.testing.search.check_all", lambda *_, **__: {}["a mistake"])
    status, _, err = run(capsys, "user_blocks:Block")
    assert status == 3
    assert "KeyError: 'a mistake'" in err and "Please report this to MemCNN's maintainers" in err


def test_an_input_may_be_of_integers_and_a_condition_of_both_directions(blocks, capsys):
    arguments = ["--shape", "2:int64<10", "--vary", "0", "--laws", "inverse,gradients"]
    status, out, err = run(capsys, "user_blocks:Conditional", *arguments)
    assert status == 0, out + err
    status, _, err = run(capsys, "user_blocks:Conditional", "--shape", "2:int64")
    assert status == 2
    assert "such as 4:int64<10" in err


def test_progress_is_printed_where_there_is_no_terminal(blocks, capsys):
    assert "inverse ..." in run(capsys, "user_blocks:Block", "--laws", "inverse", "--examples", "1")[2]


@pytest.mark.parametrize("shape", ["2,x", "", "2,0,4"])
def test_a_malformed_shape_is_misuse(blocks, capsys, shape):
    status, _, err = run(capsys, "user_blocks:Block", shape=shape)
    assert status == 2
    assert "wanted sizes of at least 1" in err


def test_the_fixture_fails_a_test_with_the_table(blocks):
    (blocks / "test_user.py").write_text("""
import torch
from user_blocks import Block, Flipped

def test_right(assert_reversible):
    assert assert_reversible(Block(), torch.randn(2, 4, 4, 4)).passed

def test_wrong(assert_reversible):
    assert_reversible(Flipped(), torch.randn(2, 4, 4, 4), laws=["inverse"])
""")
    words = ["-m", "pytest", "-p", "memcnn.testing.plugin", "-p", "no:cacheprovider"]
    done = commands.run(*words, cwd=blocks, env=ENVIRONMENT)
    assert "1 failed, 1 passed" in done.stdout
    assert re.search(r"FAIL +inverse +inverse\(forward\(x\)\) = x", done.stdout)
    assert "only in the first half along dimension 1" in done.stdout
