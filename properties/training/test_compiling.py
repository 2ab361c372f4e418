"""Each architecture is compiled once, before training and without output; captures wait for no other stream."""

import copy
import functools
import shutil
import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from memcnn import data as cifar
from memcnn.models.resnet import CifarResNet, basic_branch
from memcnn.training.compilation import compiled
from memcnn.training.execution import Execution
from memcnn.training.graph import captured
from memcnn.training.step import Evaluation, TrainingStep
from properties.support.capture import graphs_on_cpu
from properties.support.executions import COMPILED, CPU, GRAPH, PLAIN, SMALL
from properties.support.runs import DATA

PLAN = cifar.epoch_plan(0, 0, 40, pad=2, flip=True)
PART = PLAN.part(0, 8)
BOTH = Execution(graph=True, compile=True)
FUSED = Execution(graph=True, compile=True, precision="bf16", fused_norms=True)
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler: g++"
)


def tiny_resnet(num_classes: int = 10) -> CifarResNet:
    return CifarResNet(basic_branch, (1, 2), (8, 8, 16), num_classes)


def tiny_revnet(num_classes: int = 10, *, disable: bool = False) -> CifarResNet:
    """Return a RevNet with a reversible unit without leading activation, a strided unit, and a reversible unit."""
    return CifarResNet(basic_branch, (1, 2), (8, 8, 16), num_classes, reversible=True, disable=disable)


@pytest.fixture
def graphs(monkeypatch):
    """Use a fast compiler backend that has compiled nothing yet, and CUDA graphs simulated on the CPU."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    with graphs_on_cpu(monkeypatch) as captures:
        yield captures
    torch._dynamo.reset()


def cell(make, execution: Execution, *, seed: int = 0, num_classes: int = 10, steps: int = 2) -> TrainingStep:
    """Run some steps and evaluations of a cell of the table, and return the ``TrainingStep``."""
    torch.manual_seed(seed)
    model = make(num_classes).to(memory_format=torch.channels_last).train()
    step = TrainingStep(model, SMALL, DATA, execution)
    with execution.settings(CPU):
        for i in range(steps):
            step(PLAN.part(8 * i, 8 * i + 8), 0.02)
            Evaluation(model, DATA, execution, images=45, batch=20).result()
    return step


@pytest.mark.parametrize(
    ("make", "graphs_of_it", "execution"),
    # the graphs of a RevNet: begin, end, the strided unit, branches without a leading activation, branches with one
    [
        (tiny_resnet, 1, BOTH),
        (tiny_revnet, 5, BOTH),
        (tiny_revnet, 5, Execution(compile=True, precision="bf16")),
        (tiny_revnet, 5, FUSED),
        (functools.partial(tiny_revnet, disable=True), 1, COMPILED),
    ],
    ids=["CifarResNet", "RevNet", "RevNet in bf16", "RevNet with fused norms", "RevNet with the engine off"],
)
def test_a_second_cell_of_a_model_compiles_nothing_new(graphs, make, graphs_of_it, execution):
    cell(make, execution)
    assert counters["stats"]["unique_graphs"] == graphs_of_it
    before = {name: dict(counters[name]) for name in ("stats", "frames")}
    cell(make, execution, seed=1)
    cell(make, execution, num_classes=100)
    assert {name: dict(counters[name]) for name in before} == before
    assert not counters["graph_break"], "a graph that breaks leaves operations uncompiled"


@pytest.mark.parametrize(
    ("make", "execution"),
    [(tiny_resnet, PLAIN), (tiny_resnet, GRAPH), (tiny_resnet, COMPILED), (tiny_revnet, BOTH), (tiny_revnet, FUSED)],
    ids=["plain", "graph", "compile", "RevNet, graph and compile", "RevNet with fused norms"],
)
def test_preparing_a_step_has_no_effect_on_training(graphs, make, execution):
    def prepared(ahead: bool) -> TrainingStep:
        torch.manual_seed(0)
        step = TrainingStep(make().to(memory_format=torch.channels_last), SMALL, DATA, execution)
        with execution.settings(CPU):
            if ahead:
                state = {name: value.clone() for name, value in step.model.state_dict().items()}
                step.prepare(PART, 0.3)
                torch.testing.assert_close(dict(step.model.state_dict()), state, rtol=0, atol=0)
                assert step.totals.tolist() == [0, 0] and step.iteration == 0 and step.preparation == ""
                compilations = dict(counters["frames"])
            for i in range(3):
                step(PLAN.part(8 * i, 8 * i + 8), 0.02)
        assert not ahead or dict(counters["frames"]) == compilations, "nothing is left to compile"
        return step

    ahead, not_ahead = prepared(True), prepared(False)
    torch.testing.assert_close(dict(ahead.model.state_dict()), dict(not_ahead.model.state_dict()), rtol=0, atol=0)
    assert ahead.totals.tolist() == not_ahead.totals.tolist()
    assert len(graphs) == 2 * execution.graph


def test_a_step_names_its_preparations():
    def words(execution: Execution) -> str:
        return TrainingStep(tiny_resnet(), SMALL, DATA, execution).preparation

    assert words(PLAIN) == ""
    assert [words(some) for some in (COMPILED, GRAPH, BOTH)] == ["compiling", "capturing", "compiling and capturing"]


def test_a_step_that_loads_a_state_is_captured_again(graphs):
    """A graph that is not captured again would keep using the momenta of its capture."""
    source = cell(tiny_resnet, PLAIN)
    steps = [cell(tiny_resnet, execution, steps=1) for execution in (GRAPH, PLAIN)]
    for step in steps:
        step.model.load_state_dict(source.model.state_dict())
        step.load_state_dict(copy.deepcopy(source.state_dict()), iteration=2)
        step(PART, 0.02)
    for got, wanted in zip(*(step.model.state_dict().values() for step in steps), strict=True):
        torch.testing.assert_close(got, wanted)


@needs_compiler
def test_compiling_emits_no_warning():
    """The test uses the compiler that training uses, and all kinds of units of a RevNet."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = CifarResNet(basic_branch, (1,), (8, 8), reversible=True).to(memory_format=torch.channels_last)
    step = TrainingStep(model, SMALL, DATA, COMPILED)
    with warnings.catch_warnings(record=True) as said, COMPILED.settings(CPU):
        warnings.simplefilter("always")
        step.prepare(PART, 0.1)
        step(PART, 0.1)
    assert step.preparation == "" and step.iteration == 1
    torch._dynamo.reset()
    assert [str(warning.message) for warning in said] == []


def test_a_model_that_is_no_resnet_is_compiled_as_a_whole(graphs):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
    x = torch.randn(2, 3)
    torch.testing.assert_close(compiled(model)(x), model(x))
    torch.testing.assert_close(compiled(model, lambda x: 2 * model(x))(x), 2 * model(x))
    assert counters["stats"]["unique_graphs"] == 2


def test_a_graph_is_captured_on_the_callers_stream_or_beside_the_default_one(graphs):
    total = torch.zeros(())

    def update() -> None:
        total.add_(1)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        replay = captured(update, [total])
    assert graphs[0].stream is stream
    captured(update, [total])
    assert graphs[1].stream not in (stream, torch.cuda.default_stream())
    assert graphs[1].stream in torch.cuda.default_stream().waited
    assert total == 0, "the state is restored"
    replay()
    assert total == 1


def test_an_error_in_a_capture_is_raised_and_ends_the_capture(graphs):
    calls = []

    def update() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        captured(update, [torch.zeros(())])
    before = len(graphs[0].calls)
    torch.zeros(()).add_(1)
    assert len(graphs[0].calls) == before, "operations are still captured"
