"""The Docker image: its requirements come before the code, records name its commit, and sdist and wheel install."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from memcnn.training import environment

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text("utf-8")
COMPOSE = (ROOT / "docker" / "compose.yaml").read_text("utf-8")
HARNESS = ("jinja2", "matplotlib", "pandas", "scipy", "tabulate", "pytest", "fastjsonschema")


def requirements() -> list[str]:
    """Return the lines that docker/requirements.py prints."""
    command = [sys.executable, str(ROOT / "docker" / "requirements.py"), str(ROOT / "setup.py")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_the_requirements_of_the_image_are_those_of_setup_py():
    found = requirements()
    assert {"torch>=2.11", "hypothesis", "pandas>=2.2", "tqdm"} <= set(found)
    source = (ROOT / "setup.py").read_text("utf-8")
    assert all(f'"{line}"' in source or line == "setuptools" for line in found)


def test_a_change_of_the_code_keeps_the_layer_of_the_requirements():
    steps = re.findall(r"^(COPY|RUN) (.*)$", DOCKERFILE, re.MULTILINE)
    installs = [i for i, (_, text) in enumerate(steps) if "requirements.py setup.py" in text]
    everything = [i for i, (_, text) in enumerate(steps) if text == ". ."]
    assert len(installs) == len(everything) == 1 and installs[0] < everything[0]
    copied = [word for kind, text in steps[: installs[0]] if kind == "COPY" for word in text.split()[:-1]]
    assert copied == ["setup.py", "constraints.txt", "docker/requirements.py"]
    assert all((ROOT / name).is_file() for name in copied)
    assert "ARG COMMIT" in DOCKERFILE[DOCKERFILE.index("COPY . .") :], "a new commit renews no layer before the code"
    assert "MEMCNN_COMMIT=${COMMIT}" in DOCKERFILE and "COMMIT: ${COMMIT:-}" in COMPOSE


def test_outside_a_checkout_the_commit_is_that_of_the_image(monkeypatch):
    monkeypatch.setattr(environment, "git", lambda *words: None)
    monkeypatch.setenv("MEMCNN_COMMIT", "0123abcd")
    assert environment.git_state() == {"commit": "0123abcd", "clean": None}
    monkeypatch.delenv("MEMCNN_COMMIT")
    assert environment.git_state() == {"commit": None, "clean": None}


@pytest.mark.skipif(not os.environ.get("MEMCNN_INSTALL"), reason="takes a minute: set MEMCNN_INSTALL=1")
def test_sdist_and_wheel_install_and_the_wheel_alone_verifies_and_trains(tmp_path):
    """Build an sdist, a wheel from it, and install that where the harness's packages cannot be imported."""
    quiet = {"check": True, "capture_output": True, "text": True}
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir",
         str(tmp_path)],
        cwd=ROOT, **quiet,
    )  # fmt: skip
    (sdist,) = tmp_path.glob("memcnn-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist)], **quiet)
    (wheel,) = tmp_path.glob("memcnn-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    running = dict.fromkeys(sysconfig.get_paths()[kind] for kind in ("purelib", "platlib"))
    (site / "running.pth").write_text("\n".join(running))  # torch and the other requirements, without a download
    (site / "sitecustomize.py").write_text(f"import sys\nfor name in {HARNESS}: sys.modules[name] = None\n")
    binaries = tmp_path / "venv" / "bin"
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], **quiet)
    (tmp_path / "blocks.py").write_text(
        "from torch import nn\nimport memcnn\ndef make(): return memcnn.AdditiveCoupling(nn.Conv2d(2, 2, 1))\n"
    )
    smoke = ["memcnn-train", "resnet32", "cifar10", "--recipe", "smoke", "--data", "generated"]
    run = "runs/resnet32-cifar10-smoke-s0-generated"
    for command in (
        ["memcnn-train", "--version"],
        ["memcnn-verify", "blocks.py:make", "--shape", "2,4,4,4", "--examples", "2"],
        [*smoke, "--iterations", "12"],
        ["memcnn-evaluate", run],
        ["memcnn-convert", "--version"],
    ):
        command = [str(binaries / command[0]), *command[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
