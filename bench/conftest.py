"""Options and fixtures of the benchmark suites."""

import os
import time
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from bench import block, folders, measure
from bench.cases import chains, law
from bench.gate import gated
from bench.modes import modes, why_not
from bench.networks import networks
from bench.reference import references
from memcnn import cli
from memcnn.training.execution import Execution
from memcnn.training.options import duration

UNSEEN = ("compile-branches", "compile-model", "graph")  # modes in which meters do not see the tensors of each operator
REPEATS = {"quick": 3, "full": 5}
DEADLINE = pytest.StashKey[float | None]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memcnn")
    group.addoption("--quick", action="store_true", help="fewer and smaller cases")
    group.addoption("--modes", action="store_true", help="compare precision, compiler, ... on the CPU too")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--block", metavar="TARGET", help="measure chains of this block in place of the project's own")
    group.addoption("--shape", type=cli.shape, metavar="N,C,...", help="input shape of the block")
    group.addoption("--depths", type=cli.counts, default=block.DEPTHS, metavar="A,B,...", help="depths of the chains")
    group.addoption("--device", default=default, help=f"where to run (here: {default})")
    group.addoption("--clock", choices=list(measure.CLOCKS), default="wall", help="wall or CPU time (default: wall)")
    group.addoption("--budget", type=duration, help="start no case after so much time, such as 3m")
    group.addoption("--threads", type=int, help="threads of PyTorch on the CPU (default: as OMP_NUM_THREADS says)")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError(
            "the suites in bench need pytest-benchmark, which is disabled or not installed: leave "
            "out -p no:benchmark, or install it (pip install pytest-benchmark)"
        )
    if threads := config.getoption("threads"):
        torch.set_num_threads(threads)
    measure.source = measure.CLOCKS[config.getoption("clock")]
    try:
        folders.choose_device(config.getoption("device"))  # streams, counters and the clock take the current device
    except ValueError as error:
        raise pytest.UsageError(f"--{error}") from None
    budget = config.getoption("budget")
    config.stash[DEADLINE] = None if budget is None else time.monotonic() + budget


def pytest_runtest_setup(item: pytest.Item) -> None:
    deadline = item.config.stash[DEADLINE]
    if deadline is not None and time.monotonic() >= deadline:
        pytest.skip("not measured: the budget is used up; give a longer --budget, or select cases with -k")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # must run before the wrapper of pytest-benchmark
def pytest_sessionfinish(session: pytest.Session):
    """Drop the benchmark that Ctrl-C left without a round: pytest-benchmark would fail on it and save no other."""
    measured = session.config._benchmarksession
    measured.benchmarks = [benchmark for benchmark in measured.benchmarks if benchmark.stats.data]
    return (yield)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    sizes = {"quick": config.getoption("quick"), "cuda": config.getoption("device").startswith("cuda")}
    own = [*chains(**sizes), *networks(**sizes), *modes(**sizes), *([] if sizes["quick"] else references())]
    target = config.getoption("block")
    cases = block.cases(target, config.getoption("shape"), config.getoption("depths")) if target else own
    reasons = {case: why_not(case, cuda=sizes["cuda"], everywhere=config.getoption("modes")) for case in cases}
    if "repeat" in metafunc.fixturenames:
        turns = in_turn(cases, REPEATS["quick" if sizes["quick"] else "full"])
        turns = [(case, repeat) for case, repeat in turns if repeat == 0 or not reasons[case]]
        metafunc.parametrize(("case", "repeat"), [_parameters(reasons[turn[0]], *turn) for turn in turns])
    else:
        small = [] if target else [*gated(), *law(quick=sizes["quick"])]
        cases = [*small, *(case for case in cases if case.mode not in UNSEEN)]
        metafunc.parametrize("case", [_parameters(reasons.get(case), case) for case in cases])


def in_turn(cases: list, repeats: int) -> list[tuple]:
    """Return (case, repeat) for ``repeats`` rounds of each cycle, starting with another case each time."""
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
    return folders.choose_device(pytestconfig.getoption("device"))


@pytest.fixture(scope="session", autouse=True)
def plain_settings(device: torch.device) -> Iterator[None]:
    """Run float32 as float32: by default PyTorch rounds the inputs of a GPU's convolutions to tf32."""
    with Execution().settings(device):
        yield


@pytest.fixture(scope="session")
def environment(device: torch.device, pytestconfig: pytest.Config) -> dict:
    return folders.environment(device, pytestconfig.getoption("clock"))


@pytest.fixture
def labelled(benchmark, case, environment: dict):
    """Return the ``benchmark`` fixture, whose ``extra_info`` identifies the measurement."""
    benchmark.extra_info.update(case.info(), **environment, load=os.getloadavg()[0])
    return benchmark
