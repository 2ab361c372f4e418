"""The package of meters needs only torch, and its names can also be imported from ``memcnn.testing``."""

import importlib
import os
import shutil
from pathlib import Path

import pytest

import memcnn.memory
from properties.support import commands

ALONE = """
import sys
import torch
import meters
assert "memcnn" not in sys.modules
assert meters.tensor_peak_bytes(lambda: torch.ones(25)) == meters.allocator_peak_bytes(lambda: torch.ones(25)) == 100
"""


def test_it_needs_nothing_but_torch_and_works_under_another_name(tmp_path):
    """Other packages and older commits are measured by a copy of it."""
    shutil.copytree(Path(memcnn.memory.__file__).parent, tmp_path / "meters")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "KINETO_LOG_LEVEL": "99"}
    done = commands.run("-c", ALONE, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("place", "names"),
    [
        (
            "memory",
            "CUDA_BLOCK_BYTES PeakSplit StepMemory TensorMeter allocator_peak_bytes measure_peak_split "
            "measure_step_memory tensor_peak_bytes",
        ),
        ("allocator", "CUDA_BLOCK_BYTES allocator_peak_bytes allocator_total_bytes in_blocks"),
        ("prediction", "SGD Batch Loss MakeOptimizer predict_step_memory step_flops training_step"),
    ],
)
def test_names_can_be_imported_from_their_former_place(place, names):
    former = importlib.import_module(f"memcnn.testing.{place}")
    module = importlib.import_module("memcnn.memory.prediction") if place == "prediction" else memcnn.memory
    assert sorted(former.__all__) == sorted(names.split())
    assert all(getattr(former, name) is getattr(module, name) for name in former.__all__)
