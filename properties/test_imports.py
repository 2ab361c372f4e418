"""Imports go one way: between the four packages, and between the parts of ``memcnn``."""

import ast
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("memcnn", "reports", "bench", "properties")
"""A package may import the packages before it, but none after it."""

PARTS = {
    "attribution": set(),
    "engine": {"attribution", "reuse"},
    "memory": set(),
    "data": {"_torchvision", "datasets"},
    "kernels": {"attribution", "autocast", "engine", "reuse"},
    "models": {"attribution", "autocast", "engine", "memory", "migration"},
    "testing": {"cli", "engine", "memory", "models"},
    "training": {"_torchvision", "cli", "data", "datasets", "kernels", "memory", "models"},
    "weights": {"datasets", "models", "training"},
    "cli": set(),
    "rounding": {"engine"},
    "convert": {"cli", "models", "weights"},
    "evaluate": {"cli", "data", "training", "weights"},
    "train": {"cli", "data", "migration", "models", "training"},
    "verify": {"cli", "testing"},
}
"""The folders and files of ``memcnn`` that each part, a folder or a file, may import; a part without an entry: none."""

PUBLIC = ROOT / "memcnn" / "__init__.py"
"""The package's public names, which come from several parts."""

IMPORT_ANOTHER_TEST = {f"properties.engine.test_{name}" for name in ("arguments_memory", "drift", "parameters")}
"""Tests that still import from another test instead of ``properties.support``."""


def imported(source: str, module: str) -> set[str]:
    """Return the full names that a module's text imports, within functions as well.

    Args:
        source: the text.
        module: the module's full name, which relative imports start from.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def module_name(path: Path) -> str:
    """Return the name of the module in a file. That of a package ends with ``__init__``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def part_of(name: str) -> str:
    """Return the part of ``memcnn`` that a full name belongs to: its second word; "" for a public name of memcnn."""
    part = name.split(".")[1] if name.startswith("memcnn.") else ""
    return part if any((ROOT / "memcnn" / f"{part}{end}").exists() for end in ("", ".py")) else ""


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_none_that_is_built_on_it(package):
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    found = {
        f"{module_name(path)} imports {name}"
        for path in modules(package)
        for name in imported(path.read_text("utf-8"), module_name(path))
        if name.partition(".")[0] in later
    }
    assert found == set()


@pytest.mark.parametrize("path", [path for path in modules("memcnn") if path != PUBLIC], ids=module_name)
def test_a_part_of_memcnn_imports_only_the_parts_that_it_is_built_on(path):
    own = part_of(module_name(path))
    found = {
        part_of(name) for name in imported(path.read_text("utf-8"), module_name(path)) if name.startswith("memcnn.")
    }
    assert found - {own, ""} <= PARTS.get(own, set())


def test_tests_share_code_through_support_only():
    found = {
        module_name(path)
        for path in modules("properties")
        for name in imported(path.read_text("utf-8"), module_name(path))
        if any(part.startswith("test_") for part in name.split(".")[:-1])
    }
    assert found == IMPORT_ANOTHER_TEST


def test_no_two_parts_of_memcnn_import_each_other():
    def below(one: str, seen: frozenset[str] = frozenset()) -> set[str]:
        others = PARTS.get(one, set()) - seen
        return others.union(*(below(other, seen | others) for other in others))

    assert [one for one in PARTS if one in below(one)] == []


def test_an_import_is_found_wherever_and_however_it_is_written():
    source = (
        "import memcnn.testing as t\ndef f():\n    from . import record\n    from ..testing.checks import check_all"
    )
    assert imported(source, "memcnn.training.loop") == {
        "memcnn.testing",
        "memcnn.training.record",
        "memcnn.testing.checks.check_all",
    }
    assert (part_of("memcnn.testing.checks.check_all"), part_of("memcnn.cli"), part_of("memcnn.AdditiveCoupling")) == (
        "testing",
        "cli",
        "",
    )
