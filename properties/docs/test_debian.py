"""The Dockerfile's install steps in a clean Debian tree. Skipped by default: needs root, debootstrap and 2 GB.

MEMCNN_DEBIAN names the folder of the tree. It is made there if it is missing, which needs debootstrap:

    sudo env MEMCNN_DEBIAN=/var/tmp/debian pytest -s properties/docs/test_debian.py

The tree stands for the base image: Debian's Python with the torch that pip finds, in place of the image's CUDA build.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from properties.support.pages import ROOT

TREE = os.environ.get("MEMCNN_DEBIAN")
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text("utf-8").replace("\\\n", " ")
BASE = ["python3", "python3-pip", "python3-venv", "ca-certificates"]
CUDA = """&& python -c "import torch; assert torch.version.cuda, 'the CUDA build of torch was replaced'\""""
MOST_MEGABYTES = 800
"""The Dockerfile says 485; a package that brings a second torch or a CUDA library needs more."""

pytestmark = [
    pytest.mark.skipif(not TREE, reason="minutes and gigabytes: set MEMCNN_DEBIAN to a folder for the tree"),
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="chroot needs root"),
]


def steps() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile that change files, in order: ("RUN" or "COPY", its text)."""
    return re.findall(r"^(RUN|COPY|WORKDIR) (.*)$", DOCKERFILE, re.MULTILINE)


@pytest.fixture(scope="module")
def tree():
    """Return the folder of a Debian tree with pip's settings, its packages and torch."""
    folder = Path(TREE)
    if not (folder / "usr/bin/python3").exists():
        if not shutil.which("debootstrap"):
            pytest.skip("needs debootstrap: apt-get install debootstrap")
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(BASE)}", "bookworm", str(folder)]
        subprocess.run([*command, "http://deb.debian.org/debian"], check=True)
    for name in ("etc/resolv.conf", "etc/ssl/certs/ca-certificates.crt"):  # the network as this machine sees it
        shutil.copy(Path("/") / name, folder / name)
    return folder


def run(tree: Path, command: str, folder: str = "/") -> str:
    """Run a shell command in the tree; return its output. pip has the settings of this process."""
    pip = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PIP_")]
    inside = ["env", "-i", "PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME=/tmp", *pip]
    shell = f"cd {shlex.quote(folder)} && {command}"
    done = subprocess.run(["chroot", str(tree), *inside, "sh", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def megabytes(tree: Path) -> float:
    done = subprocess.run(["du", "-sx", "--block-size=1", str(tree)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0]) / 1e6


def copy_in(tree: Path, words: str, folder: str) -> None:
    """Do what COPY does; all files that git knows stand for "."."""
    *sources, _ = words.split()
    target = tree / folder.lstrip("/")
    if sources == ["."]:
        archive = subprocess.run(["git", "-C", str(ROOT), "archive", "HEAD"], capture_output=True, check=True).stdout
        subprocess.run(["tar", "x", "-C", str(target)], input=archive, check=True)
    else:
        for source in sources:
            shutil.copy(ROOT / source, target)


def test_the_install_steps_run_in_a_clean_debian_and_the_image_trains(tree):
    for name in ("opt/venv", "opt/memcnn", "data", "results"):
        shutil.rmtree(tree / name, ignore_errors=True)
    run(tree, "ln -sf /usr/bin/python3 /usr/local/bin/python; userdel memcnn 2>/dev/null; true")
    pins = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    (tree / "tmp/torch.txt").write_text("\n".join(pins))
    run(tree, "python -m pip install --quiet --break-system-packages --constraint /tmp/torch.txt torch")
    torch = run(tree, "python -c 'import torch; print(torch.__version__)'")
    before, folder, sizes = megabytes(tree), "/", {}
    for kind, text in steps():
        if kind == "WORKDIR":
            folder = text
            (tree / folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif kind == "COPY":
            copy_in(tree, text, folder)
        else:
            run(tree, text.replace(CUDA, ""), folder)
        sizes[text[:40]] = megabytes(tree)
    assert run(tree, "python -c 'import torch; print(torch.__version__)'") == torch, "torch was replaced"
    added = megabytes(tree) - before
    print(
        f"\nbase {before:,.0f} MB, added {added:,.0f} MB;", {name: round(size - before) for name, size in sizes.items()}
    )
    assert added < MOST_MEGABYTES
    said = run(
        tree,
        "PYTHONPATH=/opt/memcnn python -m memcnn.train resnet32 cifar10 --recipe smoke --data generated",
        "/results",
    )
    assert "complete" in said
    said = run(tree, "PYTHONPATH=/opt/memcnn python -m bench.reproduce_table --out table", "/results")
    assert "12 cells" in said
