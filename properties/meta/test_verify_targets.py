"""`python -m memcnn.verify` on files that cannot be imported and functions that make no module: misuse, not a crash."""

import sys

import pytest

from memcnn import verify

CODE = {
    "syntax.py": "import torch\n\ndef make(:\n    pass\n",
    "name.py": "import torch\n\nvalue = undefined\n",
    "missing.py": "import torch\nimport no_such_package_at_all\n",
    "leaving.py": "import sys\nsys.exit('bye')\n",
    "factories.py": """
import sys
import torch
from torch import nn

class Block(nn.Module):
    def forward(self, x):
        return x + 1

    def inverse(self, y):
        return y - 1

class Unfinished(Block):
    def __init__(self):
        super().__init__()
        self.weight = self.bias + 1

def exits():
    sys.exit("usage: factories.py")

def nothing():
    Block()

def prints():
    print("weights are loaded")
    return Block()

class Exiting(Block):
    def forward(self, x):
        return x + x.tanh()

    def inverse(self, y):
        sys.exit("no inverse")

made = []
def once():
    if made:
        raise RuntimeError("the file is used up")
    made.append(1)
    return Block()
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, code in CODE.items():
        (tmp_path / name).write_text(code)
    for name in ("json.py", "sys.py"):
        (tmp_path / name).write_text(CODE["factories.py"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in CODE:
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def run(capsys, target: str) -> tuple[int, str, str]:
    status = verify.main([target, "--shape", "2,4", "--laws", "inverse", "--examples", "2", "--mode", "eval"])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("target", "messages"),
    [
        ("syntax.py:make", ["SyntaxError", "syntax.py, line 3", "correct that line"]),
        ("name.py:make", ["NameError: name 'undefined' is not defined", "name.py, line 3"]),
        ("missing.py:make", ["cannot import no_such_package_at_all", "missing.py, line 2", "is it installed"]),
        ("leaving.py:make", ["SystemExit('bye')", "leaving.py, line 2"]),
        ("factories.py:Unfinished", ["AttributeError", "factories.py, line 16", "needs no arguments"]),
        ("factories.py:exits", ["SystemExit('usage: factories.py')", "factories.py, line 19"]),
        ("factories.py:nothing", ["got NoneType", "wanted an nn.Module", "let the function return it"]),
        ("factories.py:once", ["RuntimeError: the file is used up", "factories.py, line 38"]),
        ("json.py:Block", ["another module of the name json", "rename the file"]),
        ("sys.py:Block", ["another module of the name sys (built in)", "rename the file"]),
    ],
)
def test_a_fault_of_the_users_file_is_misuse_with_its_line(folder, capsys, target, messages):
    status, _, err = run(capsys, target)
    assert status == 2
    assert "Traceback" not in err and "itself broke" not in err
    for message in messages:
        assert message in err


def test_what_a_function_prints_is_shown_once_and_not_in_the_report(folder, capsys):
    status, out, err = run(capsys, "factories.py:prints")
    assert status == 0
    assert "weights are loaded" not in out and err.count("weights are loaded") == 1


def test_an_inverse_that_exits_fails_the_laws(folder, capsys):
    arguments = ["--shape", "2,4", "--examples", "2", "--mode", "eval"]
    assert verify.main(["factories.py:Exiting", *arguments]) == 1
    out = capsys.readouterr().out
    assert "FAIL  inverse" in out and "FAIL  gradients" in out
    assert "the block called sys.exit('no inverse')" in out
