"""Setup of all tests: one thread, hypothesis profiles, header, summary, devices and the folder of images."""

import os
import platform
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import memcnn
from memcnn.engine import drift
from properties.devices import DEVICES, reproducible_kernels
from properties.support import errors

torch.set_num_threads(1)

# The first call into torch may take a second, so examples have no deadline. The phase `explain` traces all lines, which
# takes minutes, and the lines that it finds say nothing about a drawn block.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow],
    "phases": [phase for phase in Phase if phase is not Phase.explain],
}
settings.register_profile("dev", max_examples=10, **_COMMON)
settings.register_profile("ci", max_examples=20, derandomize=True, database=None, print_blob=True, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("MEMCNN_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


LONG = (
    "properties/reports/test_placement.py::test_a_killed_process_loses_only_its_own_cell",
    "properties/reports/test_placement.py::test_the_command_trains_on_the_devices_it_is_given",
    "properties/reports/test_reproduce_table.py::test_ctrl_c_during_a_run",
    "properties/reports/test_reproduce_table.py::test_a_smoke_run_appears",
    "properties/reports/test_report_tables.py::test_the_order_of_the_records",
    "properties/training/test_signals.py::test_sigterm_and_the_same_command_again",
    "properties/training/test_distributed_training.py::test_under_torchrun_a_killed_process",
    "properties/training/test_resuming.py::test_resuming_gives_the_same_bits",
    "properties/training/test_looking.py::test_a_dry_run_describes_the_run",
    "properties/training/test_torchvision_import.py",
    "properties/training/test_twin_curve.py",
    "properties/memory/test_prediction.py::test_the_prediction_is_the_measurement_to_the_byte[revnet164]",
    "properties/memory/test_prediction.py::test_the_prediction_is_the_measurement_to_the_byte[resnet164]",
    "properties/meta/test_verdicts.py::test_no_drawn_network_is_called_wrong",
    "properties/bench/test_compare.py::test_a_commit_is_compared",
    "properties/docs/test_walk.py::test_walk[docs",
    "properties/docs/test_walk.py::test_tox_table_trains_all_twelve_cells",
    "properties/docs/test_examples.py::test_a_training_example_runs",
    "properties/docs/test_examples.py::test_two_hundred_blocks_need_the_bytes_of_two",
    "properties/docs/test_examples.py::test_the_flow_learns_a_density_and_draws_it",
    "properties/bench/test_small_tensors.py::test_the_quick_run_names_peers",
    "properties/bench/test_block.py::test_memory_grows_with_depth",
    "properties/engine/test_kept_alive.py::test_without_gradients_a_forward_pass_leaves_nothing_behind",
    "properties/engine/test_exact.py::test_a_thousand_blocks_are_undone_without_any_error",
    "properties/laws/test_inversion.py::test_the_reversible_stages_of_a_network_invert[revnet164]",
    "properties/laws/test_inversion.py::test_the_reversible_stages_of_a_network_invert[revnet110]",
    "properties/laws/test_log_det.py::test_log_determinants_of_larger_flows_are_right_and_cancel",
)
"""Beginnings of the names of tests that take ten seconds and more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the long tests, and skip them if ``MEMCNN_LONG`` is 0, as ``tox`` sets it."""
    left_out = os.environ.get("MEMCNN_LONG") == "0"
    for item in items:
        if item.nodeid.startswith(LONG):
            item.add_marker("long")
            if left_out:
                item.add_marker(pytest.mark.skip(reason="takes ten seconds or more: run `tox -e long`"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}, no CUDA"
    return [
        f"memcnn {memcnn.__version__}, torch {torch.__version__}, torchvision {version('torchvision')}",
        f"device: {device}, {torch.get_num_threads()} thread; "
        f"hypothesis profile: {settings.get_current_profile_name()} (MEMCNN_PROFILE=dev|ci|thorough)",
        f"MEMCNN_DATA: {os.environ.get('MEMCNN_DATA') or 'not set, tests on real CIFAR images are skipped'}",
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the largest errors that the laws measured, next to their limits."""
    if errors.LARGEST:
        terminalreporter.section("largest errors, their limits, and the share of the limit")
        for line in errors.table():
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of pytest-xdist
        session.config.workeroutput["largest errors"] = [(*key, *value) for key, value in errors.LARGEST.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for *key, error, limit in getattr(node, "workeroutput", {}).get("largest errors", ()):
        errors.remember(tuple(key), error, limit)


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The device that a test runs on."""
    return request.param


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """Run a test on ``device`` without naming it: modules and tensors that the test makes are made there."""
    if device == "cpu":
        yield
    else:
        with torch.device(device):
            yield


@pytest.fixture(autouse=True)
def reproducible(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start every test from the same seed; a test that takes ``device`` gets deterministic kernels.

    After a test on a GPU, wait for the measurements of the drift watch, so that its warning belongs to this test.
    """
    torch.manual_seed(0)
    with reproducible_kernels() if "device" in request.fixturenames else nullcontext():
        yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        drift.read_arrived()


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The folder with the official CIFAR files; a test that takes it is skipped if ``MEMCNN_DATA`` names none."""
    data = os.environ.get("MEMCNN_DATA")
    if data in (None, "", "generated"):
        pytest.skip("needs real CIFAR: set MEMCNN_DATA to the folder of cifar-10-batches-py and cifar-100-python")
    folder = Path(data)
    if not any((folder / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python")):
        pytest.fail(f"MEMCNN_DATA is {folder}, but neither cifar-10-batches-py nor cifar-100-python is there")
    return folder
