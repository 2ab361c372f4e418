"""Options and fixtures of the benchmark suites."""

import pytest
import torch

from bench.cases import Case, cases
from memcnn.training.environment import device_info, git_state, software_versions

REPEATS = {"test_time": 3, "test_memory": 1}  # bytes do not vary


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memcnn")
    group.addoption("--quick", action="store_true", help="depth up to 16, batch 8")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", default=default, help=f"where to run (here: {default})")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        wanted = cases(quick=metafunc.config.getoption("quick"), repeats=REPEATS[metafunc.function.__name__])
        metafunc.parametrize("case", wanted, ids=str)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture(scope="session")
def environment(device: torch.device) -> dict:
    return {"device": device_info(device), "software": software_versions(), **git_state()}


@pytest.fixture
def labelled(benchmark, case: Case, environment: dict):
    """The `benchmark` fixture, with what identifies the measurement in its `extra_info`."""
    benchmark.extra_info.update(vars(case), **environment)
    return benchmark
