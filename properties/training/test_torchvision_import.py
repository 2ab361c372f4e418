"""torchvision can be imported with any torch; the operators that it registers are not declared again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# a torchvision in miniature: half of it is imported before the line that fails
INIT = "import torchvision.extension\nimport torchvision.registrations\nloaded = True\n"
REGISTRATIONS = """
import torch

for name in {names}:
    torch.library.register_fake("torchvision::" + name)(lambda x: x)
"""
PROGRAM = """
import torch
from memcnn._torchvision import declared, torchvision
assert torchvision.loaded and torchvision.extension.count == 1, "a half-imported module was left in place"
print(len(declared))
"""


def run_beside(folder: Path, *, extension: str, registrations: str) -> subprocess.CompletedProcess:
    """Run ``PROGRAM`` in a new interpreter, which finds a simulated torchvision first."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(INIT)
    (package / "extension.py").write_text(extension)
    (package / "registrations.py").write_text(registrations)
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="before PyTorch 2.13 a module that registers shapes cannot be imported twice"
)
def test_every_operator_that_is_missing_is_declared(tmp_path):
    done = run_beside(tmp_path, extension="count = 1", registrations=REGISTRATIONS.format(names=["nms", "qnms"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "2"


def test_a_missing_operator_is_declared(tmp_path):
    done = run_beside(tmp_path, extension="count = 1", registrations=REGISTRATIONS.format(names=["nms"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"


def test_existing_operators_are_not_declared(tmp_path):
    extension = (
        "import torch\ncount = 1\nreal = torch.library.Library('torchvision', 'DEF')\nreal.define('nms(...) -> ...')"
    )
    done = run_beside(tmp_path, extension=extension, registrations=REGISTRATIONS.format(names=["nms"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_another_error_at_import_is_not_hidden(tmp_path):
    done = run_beside(tmp_path, extension="count = 1", registrations="raise RuntimeError('out of order')")
    assert done.returncode != 0
    assert "out of order" in done.stderr


def test_the_real_torchvision_works():
    program = (
        "from memcnn._torchvision import torchvision\n"
        "import torch, torchvision.transforms.functional as transforms\n"
        "assert transforms.hflip(torch.tensor([[[1, 2]]])).tolist() == [[[2, 1]]]\n"
        "assert torchvision.datasets.CIFAR10.train_list\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
