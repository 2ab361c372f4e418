"""Commands that are forked from a server behave as those of a new Python, and find nothing of this project imported."""

import subprocess

import pytest

from properties.support.commands import run

SEEN = """
import os, sys
print([name for name in sys.modules if name.partition(".")[0] in ("memcnn", "bench", "reports", "properties")])
print(sys.argv, os.getcwd(), dict(os.environ)["WORD"], "HOME" in os.environ, __name__)
print("an error", file=sys.stderr)
sys.exit(7)
"""


def test_a_program_has_its_own_arguments_folder_environment_streams_and_status(tmp_path):
    done = run("-c", SEEN, "one", "two", cwd=tmp_path, env={"WORD": "said"})
    assert done.stdout.splitlines() == ["[]", f"['-c', 'one', 'two'] {tmp_path} said False __main__"]
    assert (done.stderr, done.returncode) == ("an error\n", 7)


@pytest.mark.parametrize(("end", "status"), [("sys.exit()", 0), ("sys.exit('why')", 1), ("raise KeyError('why')", 1)])
def test_the_end_of_a_program_is_that_of_python(end, status):
    done = run("-c", f"import sys; {end}")
    assert done.returncode == status and ("why" in done.stderr) == bool(status)


def test_modules_and_scripts_are_found_in_the_folders_that_python_searches(tmp_path):
    for folder in ("here", "added"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "place.py").write_text("import sys; print(__file__, sys.argv[1:])")
        (tmp_path / folder / "script.py").write_text("import place")
    here, added = tmp_path / "here", {"PYTHONPATH": str(tmp_path / "added")}
    assert run("-m", "place", "x", cwd=here, env=added).stdout == f"{here / 'place.py'} ['x']\n"
    assert run("-m", "place", "x", cwd=tmp_path, env=added).stdout == f"{tmp_path / 'added' / 'place.py'} ['x']\n"
    assert run(here / "script.py", cwd=tmp_path, env=added).stdout == f"{here / 'place.py'} []\n"


def test_a_command_without_end_is_killed():
    with pytest.raises(subprocess.TimeoutExpired):
        run("-c", "import time; time.sleep(600)", timeout=0.5)
