"""Options and fixtures of the benchmark suites."""

import os
from itertools import groupby

import pytest
import torch

from bench import measure
from bench.cases import chains, law
from bench.gate import gated
from bench.modes import modes, why_not
from bench.networks import networks
from memcnn.training.environment import device_info, git_state, software_versions

UNSEEN = ("compile-branches", "compile-model", "graph")  # modes whose tensors are not made by operators, one by one
REPEATS = {"quick": 3, "full": 5}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memcnn")
    group.addoption("--quick", action="store_true", help="fewer and smaller cases")
    group.addoption("--modes", action="store_true", help="compare precision, compiler, ... on the CPU too")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--device", default=default, help=f"where to run (here: {default})")
    group.addoption("--clock", choices=list(measure.CLOCKS), default="wall", help="whose seconds (wall)")
    group.addoption("--threads", type=int, help="threads of PyTorch on the CPU (default: as OMP_NUM_THREADS says)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the suites in bench need pytest-benchmark, which is disabled or not installed: leave "
                                "out -p no:benchmark, or install it (pip install pytest-benchmark)")
    if threads := config.getoption("threads"):
        torch.set_num_threads(threads)
    measure.source = measure.CLOCKS[config.getoption("clock")]


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before that of pytest-benchmark, which is a wrapper, too
def pytest_sessionfinish(session: pytest.Session):
    """Ctrl-C leaves a benchmark without a round, on which pytest-benchmark would fail and save none of the others."""
    measured = session.config._benchmarksession
    measured.benchmarks = [benchmark for benchmark in measured.benchmarks if benchmark.stats.data]
    return (yield)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    sizes = {"quick": config.getoption("quick"), "cuda": config.getoption("device").startswith("cuda")}
    cases = [*chains(**sizes), *networks(**sizes), *modes(**sizes)]
    reasons = {case: why_not(case, cuda=sizes["cuda"], everywhere=config.getoption("modes")) for case in cases}
    if "repeat" in metafunc.fixturenames:
        turns = in_turn(cases, REPEATS["quick" if sizes["quick"] else "full"])
        turns = [(case, repeat) for case, repeat in turns if repeat == 0 or not reasons[case]]
        metafunc.parametrize(("case", "repeat"), [_parameters(reasons[turn[0]], *turn) for turn in turns])
    else:
        cases = [*gated(), *law(quick=sizes["quick"]), *(case for case in cases if case.mode not in UNSEEN)]
        metafunc.parametrize("case", [_parameters(reasons.get(case), case) for case in cases])


def in_turn(cases: list, repeats: int) -> list[tuple]:
    """(case, repeat): each cycle of cases `repeats` times, each time another one first, so that drift meets all."""
    turns = []
    for _, cycle in groupby(cases, key=lambda case: case.cycle):
        cycle = list(cycle)
        for repeat in range(repeats):
            first = repeat % len(cycle)
            turns += [(case, repeat) for case in cycle[first:] + cycle[:first]]
    return turns


def _parameters(reason: str | None, *values):
    return pytest.param(*values, id="-".join(map(str, values)), marks=[pytest.mark.skip(reason)] if reason else [])


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture(scope="session")
def environment(device: torch.device, pytestconfig: pytest.Config) -> dict:
    more = {"cores": os.cpu_count(), "clock": pytestconfig.getoption("clock")}
    return {"device": device_info(device) | more, "software": software_versions(), **git_state()}


@pytest.fixture
def labelled(benchmark, case, environment: dict):
    """The `benchmark` fixture, with what identifies the measurement in its `extra_info`."""
    benchmark.extra_info.update(case.info(), **environment, load=os.getloadavg()[0])
    return benchmark
