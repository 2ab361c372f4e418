"""The engine uses private names of PyTorch in one file only, each with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import memcnn.engine
import memcnn.models

FOLDERS = [Path(package.__path__[0]) for package in (memcnn.engine, memcnn.models)]
FILES = [path for folder in FOLDERS for path in sorted(folder.glob("*.py")) if path.name != "torch_private.py"]
ATTRIBUTES = {
    "_version",
    "_cdata",
    "_modules",
    "_parameters",
    "_buffers",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
}
"""Private attributes that ``torch_private`` allows to be read in place."""


def private_names(tree: ast.Module) -> Iterator[str]:
    """Return the private names, except our own, that are imported from torch or read from anything but ``self``."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))
            yield from (part for part in node.module.split(".")[1:] if part.startswith("_") and part not in PUBLIC)
        is_private = isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if is_private and node.attr not in own:
            yield node.attr


PUBLIC = {"_pytree", "_python_dispatch"}
"""Modules of torch.utils with private names that PyTorch's documentation recommends."""
OURS = {"_fn", "_give"}
"""Private attributes of our own classes that are read in other files."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_private_names_of_torch_stand_in_one_file(path: Path):
    assert set(private_names(ast.parse(path.read_text()))) <= ATTRIBUTES | OURS


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch._C._set_grad_enabled(True)",
        "from torch._C import _autograd",
        "from torch.nn.modules.batchnorm import _BatchNorm",
    ],
)
def test_a_private_name_is_found(line):
    assert set(private_names(ast.parse(line))) - ATTRIBUTES - OURS
