"""The environment of a run: device, software versions, and the state of its source code."""

import os
import platform
import subprocess
from pathlib import Path

import torch

import memcnn
from memcnn._torchvision import torchvision
from memcnn.training.record import Segment

_PACKAGE = Path(memcnn.__file__).resolve().parent


def device_info(device: torch.device) -> dict:
    """Return type, name, count and CPU threads of the device that trains."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {"type": device.type, "name": name, "count": 1, "threads": torch.get_num_threads()}


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def software_versions() -> dict:
    """Return the versions of the software, as plain text, which a checkpoint can hold; None for CUDA without it."""
    return {
        "memcnn": memcnn.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "cuda": torch.version.cuda and str(torch.version.cuda),
        "platform": platform.platform(),
    }


def git_state() -> dict:
    """Return the package's commit, and whether its folder is as committed; both None if they are unknown.

    Outside a git checkout of the package, as in a Docker image, the commit is that of ``MEMCNN_COMMIT``.
    """
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return {"commit": os.environ.get("MEMCNN_COMMIT") or None, "clean": None}
    changes = git("status", "--porcelain", "--", ".")
    return {"commit": git("rev-parse", "HEAD"), "clean": None if changes is None else changes == ""}


def segment_from(iteration: int, *, execution: str, device: torch.device, processes: int, shared_by: int) -> Segment:
    """Return the segment that begins here and now, without any iterations yet.

    Args:
        iteration: iterations done before it.
        execution: how its steps are executed, as ``str(Execution)``.
        device: the device that trains.
        processes: how many processes share each batch.
        shared_by: how many runs share the device.
    """
    return Segment(
        first=iteration,
        last=iteration,
        execution=execution,
        device={**device_info(device), "count": processes},
        software=software_versions(),
        **git_state(),
        shared_by=shared_by,
        train_seconds=0.0,
    )


def git(*arguments: str) -> str | None:
    """Return what git prints for the package's folder. Return None without git, or outside of a checkout."""
    try:
        done = subprocess.run(["git", "-C", str(_PACKAGE), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
