"""The page of findings in public packages: its verdicts, and the rules of its programs."""

import ast

import pytest

from bench.audit.findings import PACKAGES, REPRODUCTIONS, verdict

PROGRAMS = sorted(REPRODUCTIONS.glob("*.py"))
NAMES = {"torch", *(requirement.partition("==")[0].lower() for requirement in PACKAGES)}


def row(*results: dict, known=None, mode="train") -> dict:
    return {"columns": {"inverse": list(results)}, "known": known or {}, "mode": mode}


def result(verdict: str, claim: str = "inverse(forward(x)) = x", error: object = 1.0) -> dict:
    return {"law": "inverse", "verdict": verdict, "claim": claim, "error": error}


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_a_reproduction_needs_only_its_package_and_torch_and_fails_once_the_package_is_repaired(file):
    tree = ast.parse(file.read_text("utf-8"))
    title = ast.get_docstring(tree).splitlines()[0]
    package = title.split()[0].lower()
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0].lower() for name in imported}
    assert package in NAMES and package in roots
    assert roots <= {package, "torch", "copy", "random", "warnings"}
    assert any(isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(tree))


def test_a_failure_that_the_package_declares_in_this_mode_is_declared():
    failed = result("FAIL")
    assert verdict(row(failed), "inverse") == "**FAIL**"
    assert verdict(row(failed, known={"inverse": "why"}), "inverse") == "declared"
    assert verdict(row(failed, known={"inverse in train": "why"}), "inverse") == "declared"
    assert verdict(row(failed, known={"inverse in train": "why"}, mode="eval"), "inverse") == "**FAIL**"


def test_only_a_small_error_in_float64_is_that_of_float32():
    exact = "inverse(forward(x)) = x in float64"
    assert verdict(row(result("PASS"), result("FAIL", exact, 1e-7)), "inverse") == "float32"
    assert verdict(row(result("FAIL", exact, 1e-3)), "inverse") == "**FAIL**"
    assert verdict(row(result("FAIL", error=1e-7)), "inverse") == "**FAIL**"
    assert verdict(row(result("FAIL", exact, 1e-7), result("FAIL", exact, "nan")), "inverse") == "**FAIL**"


def test_what_was_skipped_is_neither_right_nor_wrong():
    assert verdict(row(result("SKIP")), "inverse") == ""
    assert verdict(row(result("SKIP"), result("PASS")), "inverse") == "PASS"
