"""The folders of measurements: reports/bench/<device>/, committed, one for each device."""

import argparse
import json
import os
import re
from pathlib import Path

import torch

from memcnn import cli
from memcnn.training.environment import device_info, git_state, software_versions

MEASUREMENTS = Path(__file__).resolve().parents[1] / "reports" / "bench"
PAGES = MEASUREMENTS.parent / "out" / "bench"
"""Rendered pages, which git ignores."""
ENVIRONMENT = "environment.json"


def slug(device: torch.device) -> str:
    """Return the name of a device's folder: "cpu", or the GPU's name as in "nvidia-h200"."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def folder_of(device: torch.device, root: Path = MEASUREMENTS) -> Path:
    """Return the folder of a device's measurements, which may not exist yet."""
    return root / slug(device)


def page_folder(folder: Path) -> Path:
    """Return the folder of a report's page: that of its data, or one that git ignores if the data is committed."""
    folder = folder.resolve()
    return PAGES / folder.relative_to(MEASUREMENTS) if folder.is_relative_to(MEASUREMENTS) else folder


def choose_device(name: str | None) -> torch.device:
    """Return the device of that name, by default the first GPU or else the CPU, and make it PyTorch's current one.

    Streams, memory counters and ``torch.cuda.synchronize`` are those of the current device by default.

    Raises:
        ValueError: when PyTorch does not see such a device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cpu", *(f"cuda:{index}" for index in range(count))]
    name = there[-count] if name in (None, "cuda") and count else name or "cpu"
    if name not in there:
        raise ValueError(f"device: got {name!r}, but this PyTorch sees only {', '.join(there)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def add_place_options(parser: argparse.ArgumentParser, files: str, *, device: str | None = None) -> None:
    """Add --device and --out.

    Args:
        parser: the command line.
        files: the content of the folder of --out, for the help text.
        device: the default of --device; by default the first GPU, or the CPU without one.
    """
    default = device or "cuda where there is one, else cpu"
    parser.add_argument("--device", default=device, help=f"cpu, cuda, cuda:1 ... (default: {default})")
    parser.add_argument(
        "--out", type=cli.output_folder, metavar="FOLDER", help=f"folder of {files} (default: reports/bench/<device>)"
    )


def place_of(parser: argparse.ArgumentParser, given: argparse.Namespace) -> tuple[torch.device, Path]:
    """Return the device and the folder that the options ask for; end the command if there is no such device."""
    try:
        device = choose_device(given.device)
    except ValueError as error:
        parser.error(f"--{error}")
    return device, given.out or folder_of(device)


def environment(device: torch.device, clock: str) -> dict:
    """Return device, versions, commit and clock of a measurement."""
    software = software_versions()
    if device.type == "cuda":
        software["cudnn"] = str(torch.backends.cudnn.version())
    about = device_info(device) | {"cores": os.cpu_count(), "clock": clock}
    return {"device": about, "software": software, **git_state()}


def read_environment(folder: Path) -> dict | None:
    """Return the content of ``environment.json`` in the folder; None without the file.

    Raises:
        ValueError: ``python -m bench.report`` did not write the file.
    """
    path = folder / ENVIRONMENT
    if not path.is_file():
        return None
    values = json.loads(path.read_text("utf-8"))
    if not isinstance(values, dict) or not {"device", "software", "commit", "clean"} <= set(values):
        raise ValueError(f"{path}: wanted an object with device, software, commit and clean; remake it: bench.report")
    return values
