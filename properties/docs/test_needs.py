"""A command that lacks packages names them and the pip command that installs them."""

import re
import subprocess
import sys

import pytest

from memcnn import needs
from properties.support.pages import README, ROOT


def run(folder, *words: str) -> subprocess.CompletedProcess:
    """Run Python without its installed packages; only the modules in ``folder`` and the repository can be found."""
    environment = {"PYTHONPATH": f"{ROOT}:{folder}", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    "command", ["memcnn.train", "bench", "bench.reproduce_table", "reports.readme", "properties.zoo"]
)
def test_a_command_without_any_package_names_all_that_it_needs(command, tmp_path):
    done = run(tmp_path, "-m", command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    said, pip = done.stderr.splitlines()
    assert said.startswith(f"{command}: ") and " torch, " in said
    harness = not command.startswith("memcnn")
    assert ("pandas" in said) == harness
    assert pip.endswith(f"--editable '{ROOT}[harness]'" if harness else f"--editable {ROOT}")


def test_a_bench_beside_the_library_alone_asks_for_the_extra(tmp_path):
    for name in (*needs.LIBRARY, *needs.HARNESS):
        if name not in ("pandas", "pytest"):
            (tmp_path / f"{name}.py").touch()
    done = run(tmp_path, "-m", "bench")
    assert done.stderr.startswith(
        "bench: pandas and pytest are not installed; wanted the packages of the extra 'harness'"
    )


def test_a_program_that_imports_memcnn_gets_pythons_own_error(tmp_path):
    done = run(tmp_path, "-c", "import memcnn")
    assert done.returncode == 1 and "ModuleNotFoundError: No module named" in done.stderr


def test_the_names_are_those_of_setup_py():
    command = [sys.executable, "docker/requirements.py", "setup.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    required = {re.split("[<>=]", line)[0].lower() for line in printed} - {"setuptools"}
    names = {name.lower().replace("_", "-") for name in (*needs.LIBRARY, *needs.HARNESS)}
    only_tests = {"fastjsonschema", "pytest-xdist"}
    assert names | only_tests == required


def test_readme_has_the_command_that_the_results_page_shows():
    assert needs.INSTALL in README.read_text("utf-8")
