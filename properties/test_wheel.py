"""The wheel holds what an installed memcnn reads beside its modules."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_wheel_ships_the_type_marker_and_the_schema_of_records(tmp_path):
    """Type checkers look for ``py.typed`` before they read memcnn's annotations (PEP 561)."""
    pytest.importorskip("setuptools", reason="needs setuptools: pip install setuptools")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "memcnn", tmp_path / "memcnn", ignore=shutil.ignore_patterns("__pycache__", "runs", "cifar-*")
    )
    command = [sys.executable, "setup.py", "--quiet", "bdist_wheel", "--dist-dir", "dist"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("memcnn-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"memcnn/py.typed", "memcnn/training/record.schema.json", "memcnn/engine/recompute.py"} <= names
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"memcnn"}
