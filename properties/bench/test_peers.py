"""Tests of ``bench.peers``: this project gets every program right, and planted faults are found."""

import os
import signal
import time

import pytest
import torch
from torch import nn

from bench import cases
from bench.audit import peer_tables
from bench.audit.peer import worker as worker_module
from bench.audit.peer.behaviours import BEHAVIOURS, examine
from bench.audit.peer.chains import Chain, Coupling, conv_branch
from bench.audit.peers import contenders

TINY = {"blocks": 2, "batch": 2, "channels": 4, "side": 4}


@pytest.fixture(scope="module")
def running():
    """Return the workers of both ways to use this project, and of plain autograd."""
    with contenders(["ReversibleSequential", "wrapped blocks", "plain"]) as running:
        yield running.workers


@pytest.fixture(params=[0, 1], ids=["ReversibleSequential", "wrapped blocks"])
def ours(running, request):
    return running[request.param], running[-1]


def test_this_project_gets_every_behaviour_right(ours):
    outcomes = {title: ours[0].ask("behaviour", title=title) for title in BEHAVIOURS}
    assert {title: outcome for title, outcome in outcomes.items() if outcome["outcome"] != "right"} == {}


def test_this_project_evaluates_f_and_g_once_more_in_backward(ours):
    assert ours[0].ask("evaluations") == {"forward": 1, "backward": 1}


def test_convolution_work_is_four_thirds_of_plain(ours):
    for worker in ours:
        worker.ask("build", **TINY)
    flops, plain_flops = (worker.ask("work")["flops"] for worker in ours)
    assert 3 * flops == 4 * plain_flops > 0
    assert len(ours[0].ask("step", repeat=3)["seconds"]) == 3
    assert ours[0].ask("memory")["peak_bytes"] > ours[0].ask("memory")["gradient_bytes"] > 0


class Detached(Coupling):
    """Planted fault: the gradient of G does not reach the first half."""

    def forward(self, x):
        x1, x2 = x.chunk(2, 1)
        y1 = x1 + self.F(x2)
        return torch.cat((y1, x2 + self.G(y1.detach())), 1)


class Twice(Coupling):
    """Planted fault: F is evaluated twice."""

    def forward(self, x):
        self.F(x.chunk(2, 1)[1])
        return super().forward(x)


class Raises(Coupling):
    def forward(self, x):
        raise ValueError("planted\nand more")


def outcome_of(block: type[nn.Module], title: str) -> dict:
    def build(branches, **_):
        return Chain(
            branches, nn.Sequential(*(block(*pair) for pair in zip(branches[::2], branches[1::2], strict=True)))
        )

    return examine(build, BEHAVIOURS[title])


@pytest.mark.parametrize(
    ("block", "title", "outcome", "detail"),
    [
        (Coupling, "gradient of the input", "right", ""),
        (Detached, "output", "right", ""),
        (Detached, "gradient of the input", "wrong", "gradient of the input"),
        (Detached, "dropout in F and G", "wrong", "gradient"),
        (Twice, "BatchNorm moves once a step", "wrong", "2 moves, not 1"),
        (Twice, "forward hooks on F and G called once", "wrong", "6 calls, not 4"),
        (Raises, "output", "error", "ValueError: planted"),
        (Raises, "parameters changed before backward: refused", "error", "ValueError: planted"),
    ],
    ids=str,
)
def test_a_planted_fault_is_found(block, title, outcome, detail):
    found = outcome_of(block, title)
    assert found["outcome"] == outcome
    assert detail in found["detail"] and "\n" not in found["detail"]


def terminated():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_crash_or_a_hang_is_reported_as_an_error_and_stays_in_its_fork(monkeypatch):
    monkeypatch.setattr(worker_module, "LIMIT_SECONDS", 0.2)
    assert worker_module.in_a_fork(terminated)["detail"] == f"ended by signal {signal.SIGTERM:d}"
    assert worker_module.in_a_fork(lambda: time.sleep(60))["detail"] == "no answer within 0.2 s"


def test_the_branches_equal_those_of_the_other_benchmarks():
    assert str(list(conv_branch(8))) == str(list(cases.Branch(8)))


def test_ratios_are_taken_within_a_round():
    seconds = {"plain": (1.0, 2.0, 4.0), "other": (3.0, 4.0, 4.0)}
    times = [
        {"contender": name, "blocks": 4, "round": i, "seconds": s}
        for name, values in seconds.items()
        for i, s in enumerate(values)
    ]
    found = peer_tables.ratios(times)
    assert found[found.contender == "other"].ratio.tolist() == [3, 2, 1]
    assert peer_tables.spread(found[found.contender == "other"].ratio) == "2.00 [1.50, 2.50]"


def test_the_behaviour_table_shows_the_size_of_an_error():
    rows = [
        {"contender": "a", "behaviour": "z", "outcome": "right", "error": 0.0, "detail": ""},
        {"contender": "b", "behaviour": "z", "outcome": "wrong", "error": 0.5, "detail": "gradient"},
        {"contender": "a", "behaviour": "c", "outcome": "wrong", "error": None, "detail": "2 moves, not 1"},
        {"contender": "b", "behaviour": "c", "outcome": "error", "error": None, "detail": "why"},
    ]
    table = peer_tables.behaviour_table({"behaviours": rows})
    assert table.to_dict("list") == {"a": ["right", "**wrong** (2 moves, not 1)"], "b": ["**wrong** (5e-01)", "error"]}
    assert table.index.tolist() == ["z", "c"]
    assert peer_tables.messages({"behaviours": rows}) == [("b", "c", "why")]
