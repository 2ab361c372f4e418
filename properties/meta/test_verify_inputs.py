"""`python -m memcnn.verify` on a user's own batch, on conditions and on dropout, and its error messages."""

import sys
from pathlib import Path

import pytest
import torch

from memcnn import verify
from properties.support import commands

BLOCKS = """
import torch
from torch import nn
from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential

def normalised():
    return nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

def coupling():
    return AdditiveCoupling(normalised(), normalised())

def chain():
    return ReversibleSequential(*(coupling() for _ in range(4)))

def dropping():
    return nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))

class ByHand(nn.Module):
    # forward draws the masks of F and then of G, inverse those of G and then of F
    def __init__(self):
        super().__init__()
        self.f, self.g = dropping(), dropping()

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], 1)

    def inverse(self, y):
        y1, y2 = y.chunk(2, 1)
        x2 = y2 - self.g(y1)
        return torch.cat([y1 - self.f(x2), x2], 1)

class Splitting(nn.Module):
    def forward(self, x):
        return x.unflatten(1, (2, 3))

    def inverse(self, y):
        return y.flatten(1)

class InOneOrder(ByHand):
    def masks(self, x):
        ones = torch.ones(len(x), 5, dtype=x.dtype)
        return [nn.functional.dropout(ones, 0.5, self.training) for _ in range(2)]

    def branch(self, f, x, mask):
        return f[3](f[1](f[0](x)) * mask)

    def forward(self, x):
        masks, (x1, x2) = self.masks(x), x.chunk(2, 1)
        y1 = x1 + self.branch(self.f, x2, masks[0])
        return torch.cat([y1, x2 + self.branch(self.g, y1, masks[1])], 1)

    def inverse(self, y):
        masks, (y1, y2) = self.masks(y), y.chunk(2, 1)
        x2 = y2 - self.branch(self.g, y1, masks[1])
        return torch.cat([y1 - self.branch(self.f, x2, masks[0]), x2], 1)

def with_inputs_kept():
    return InvertibleModuleWrapper(ByHand(), keep_input=True)

def as_a_coupling():
    return AdditiveCoupling(dropping(), dropping())

class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(2, 3)

    def forward(self, x, condition=None):
        return x if condition is None else x * self.scale(condition).exp()

    def inverse(self, y, condition=None):
        return y if condition is None else y * (-self.scale(condition)).exp()
"""


@pytest.fixture
def blocks(tmp_path, monkeypatch):
    """The current folder, which holds a user's module ``user_inputs``."""
    (tmp_path / "user_inputs.py").write_text(BLOCKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("user_inputs", None)
    return tmp_path


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        status = verify.main([*arguments])
    except SystemExit as exit:
        status = exit.code
    out, err = capsys.readouterr()
    return status, out, err


def padded() -> torch.Tensor:
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return torch.cat((x, x.new_zeros(4, 5, 6, 6)), 1)


def test_constant_channels_of_a_users_batch_are_reported(blocks, capsys):
    torch.save(padded(), "padded.pt")
    arguments = ["--mode", "train", "--examples", "1"]
    status, out, err = run(
        capsys, "user_inputs:coupling", "--input", "padded.pt", "--laws", "inverse,gradients", *arguments
    )
    assert status == 0, out + err
    assert "NOTE: 5 of 8 channels of the input are constant: the gradients of a chain of 4 such blocks are" in out
    assert "or fill these channels with values that vary" in out


def test_a_batch_without_constants_has_no_remark(blocks, capsys):
    torch.save((torch.randn(2, 8, 4, 4),), "random.pt")
    arguments = ["--input", "random.pt", "--laws", "inverse", "--mode", "train", "--examples", "1"]
    status, out, _ = run(capsys, "user_inputs:coupling", *arguments)
    assert status == 0 and "NOTE" not in out and "inputs 2x8x4x4" in out


def one_sample_of_nan() -> torch.Tensor:
    x = padded()
    x[0] = float("nan")
    return x


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (torch.zeros(0, 8, 6, 6), "the inputs must have entries, or nothing can be compared: got (0, 8, 6, 6)"),
        (one_sample_of_nan(), "the inputs must not contain NaN, which hides errors: got (4, 8, 6, 6)"),
    ],
    ids=["empty", "NaN"],
)
def test_a_batch_with_which_no_comparison_can_fail_is_refused(blocks, capsys, batch, words):
    torch.save(batch, "batch.pt")
    status, _, err = run(capsys, "user_inputs:coupling", "--input", "batch.pt", "--laws", "inverse", "--examples", "1")
    assert status == 2 and words in err


def test_a_law_that_cannot_be_checked_does_not_pass(blocks, capsys):
    arguments = ["--shape", "3,6", "--examples", "1", "--laws", "memory", "--json", "report.json"]
    status, out, err = run(capsys, "user_inputs:Splitting", *arguments)
    assert status == 1, out + err
    assert "SKIP  memory" in out and out.rstrip().endswith("UNDECIDED: nothing could be checked")
    assert '"passed": false' in Path("report.json").read_text()


@pytest.mark.parametrize("block", ["with_inputs_kept", "as_a_coupling", "InOneOrder"])
def test_the_advice_about_dropout_works(blocks, capsys, block):
    arguments = ["--shape", "3,6", "--examples", "1", "--mode", "train", "--laws", "inverse,gradients,state,memory"]
    status, out, _ = run(capsys, "user_inputs:ByHand", *arguments)
    assert status == 1
    for advice in ("let both draw them in the same order", "use keep_input=True", "such as AdditiveCoupling"):
        assert advice in out
    status, out, err = run(capsys, f"user_inputs:{block}", *arguments)
    assert status == 0, out + err


def test_a_condition_with_a_default_is_a_condition(blocks, capsys):
    arguments = ["--shape", "3,3", "--shape", "3,2", "--laws", "inverse,gradients", "--examples", "1"]
    status, out, err = run(capsys, "user_inputs:Optional", *arguments)
    assert status == 0, out + err


def test_a_target_in_another_folder_gives_an_example_that_runs(blocks, capsys, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    arguments = ["--shape", "3,6", "--examples", "1", "--mode", "train", "--laws", "gradients"]
    _, out, _ = run(capsys, f"{blocks}/user_inputs.py:ByHand", *arguments)
    code = "\n".join(line[4:] for line in out.partition("breaks the law of gradients:\n")[2].splitlines())
    environment = {"PYTHONPATH": ":".join(["", *sys.path]), "OMP_NUM_THREADS": "1"}
    pasted = commands.run("-c", code, cwd=Path.cwd(), env=environment)
    assert "FAIL  gradients" in pasted.stdout, pasted.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["user_inputs:chain"], "one of the arguments --shape --input is required"),
        (["user_inputs:chian", "--shape", "2,8,4,4"], "no attribute 'chian'; wanted one of its names, such as"),
        (
            ["user_inputs:chain", "--input", "nowhere.pt"],
            "there is no file nowhere.pt; wanted a file in which torch.save",
        ),
        (
            ["user_inputs:chain", "--input", "user_inputs.py"],
            "user_inputs.py was not written by torch.save; wanted a file in which torch.save wrote",
        ),
        (["user_inputs:chain", "--input", "empty.pt"], "empty.pt was not written by torch.save"),
        (["user_inputs:chain", "--input", "module.pt"], "module.pt holds more than tensors"),
        (["user_inputs:chain", "--input", "."], "cannot read . (Is a directory)"),
        (["user_inputs:chain", "--input", "words.pt"], "got str in words.pt; wanted a file in which torch.save"),
        (["user_inputs:chain", "--input", "random.pt", "--vary", "0"], "--vary: got it with --input"),
        (["user_inputs:chain", "--shape", "2,8,4,4", "--seed", "-1"], "got '-1', wanted a whole number from 0"),
        (["user_inputs:chain", "--shape", "2,8,4,4", "--vry", "0"], "did you mean --vary?"),
    ],
    ids=lambda value: " ".join(value[1:3]) if isinstance(value, list) else "",
)
def test_errors_say_what_was_wanted_without_a_usage(blocks, capsys, arguments, words):
    torch.save("words", "words.pt")
    torch.save(torch.nn.ReLU(), "module.pt")
    Path("empty.pt").touch()
    torch.save(torch.randn(2, 8, 4, 4), "random.pt")
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert words in err and "usage:" not in err
    assert len([line for line in err.splitlines() if not line.startswith("Options: ")]) == 1 and "pickle" not in err


def test_the_version_is_printed(capsys):
    status, out, _ = run(capsys, "--version")
    assert status == 0 and out.startswith("memcnn ")
