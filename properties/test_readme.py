"""The tests that README shows pass as they stand there, in a project of its own, with hypothesis' own settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
WRONG, RIGHT = "y1 + self.f(y2).relu()", "y1 - self.f(y2).relu()"


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)


def run(folder: Path, block: str, *options: str) -> subprocess.CompletedProcess:
    """Run README's tests with pytest on a version of its block."""
    (folder / "blocks.py").write_text(block)
    (test,) = (text for text in examples() if "@given" in text)
    (folder / "test_blocks.py").write_text(test)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "memcnn.testing.plugin", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "PYTHONPATH": str(README.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_readmes_tests_pass_and_catch_its_planted_fault(tmp_path):
    (block,) = (text for text in examples() if WRONG in text)
    done = run(tmp_path, block.replace(WRONG, RIGHT))
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout
    done = run(tmp_path, block, "-k", "my_block")
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout
