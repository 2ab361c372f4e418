"""Under torch.compile and torch.export a block computes what its twin does, in few graphs, and stays flat in memory."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.memory import TensorMeter
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.compiler import WITHOUT_ITS_WARNINGS
from properties.support.twin import FLOOR, OnlyInvertible, conv_branch, images, plain_twin, weighted_sum

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler: install g++"
)
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]
pytestmark = [*WITHOUT_ITS_WARNINGS]


@torch.compiler.disable(recursive=False)
def uncompiled_sine(x: Tensor) -> Tensor:
    """Return sin(x). The compiler skips this frame, but not the functions that saving x calls."""
    return x.sin()


class Branch(nn.Module):
    def __init__(self, channels: int = 3, dropout: float = 0.0):
        super().__init__()
        self.net = conv_branch(channels)
        self.dropout = dropout
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            x = uncompiled_sine(x)
        return F.dropout(self.net(x), self.dropout, self.training)


class Network(nn.Module):
    """(N, 6, H, W) to the same shape, through ``depth`` blocks between ordinary layers."""

    def __init__(self, depth: int = 3, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 1)
        self.blocks = nn.ModuleList(
            InvertibleModuleWrapper(AdditiveCoupling(Branch(), Branch(dropout=dropout))) for _ in range(depth)
        )
        self.head = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).tanh()
        for block in self.blocks:
            x = block(x)
        return self.head(x.tanh())


MODELS = {
    "wrapped blocks in a loop": Network,
    "blocks with dropout": lambda: Network(dropout=0.3),
    "a reversible sequence": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 1), ReversibleSequential(*(AdditiveCoupling(Branch()) for _ in range(3)))
    ),
    "modules with forward and inverse": lambda: nn.Sequential(
        nn.Conv2d(6, 6, 1),
        *(InvertibleModuleWrapper(OnlyInvertible(AdditiveCoupling(Branch(), Branch()))) for _ in range(2)),
    ),
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled_branches(model: nn.Module, backend: str) -> nn.Module:
    for part in model.modules():
        if isinstance(part, Branch):
            part.compile(backend=backend)
    return model


def assert_steps_like(step, model: nn.Module, twin_step, twin: nn.Module, steps: int = 3) -> None:
    """``step`` trains ``model`` as ``twin_step`` trains ``twin``, and nothing is compiled after the first step."""
    frames = None
    for seed in range(steps):
        x, twin_x = images(seed=seed), images(seed=seed)
        model.zero_grad()
        twin.zero_grad()
        for run, argument in ((step, x), (twin_step, twin_x)):
            torch.manual_seed(seed)
            run(argument)
        _assert_like(model, x, twin, twin_x)
        frames = frames or counters["frames"]["total"]
        assert counters["frames"]["total"] == frames, "compiled again in a later step"


def _assert_like(model: nn.Module, x: Tensor, twin: nn.Module, twin_x: Tensor) -> None:
    parameters = zip(model.parameters(), twin.parameters(), strict=True)
    pairs = [(x.grad, twin_x.grad), *((p.grad, q.grad) for p, q in parameters)]
    largest = max(wanted.abs().max().item() for _, wanted in pairs)
    limit = tolerance(torch.float64, depth=6)
    for got, wanted in pairs:
        assert relative_error(got, wanted, least_scale=FLOOR * largest) < limit
    for got, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        assert relative_error(got, wanted) < limit


def training_step(model):
    return lambda x: weighted_sum(model(x)).backward()


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_compiled_model_trains_as_its_twin_and_is_compiled_once(make):
    torch.manual_seed(0)
    model = make().double()
    twin = plain_twin(model)
    assert_steps_like(training_step(torch.compile(model, backend="aot_eager")), model, training_step(twin), twin)


@needs_compiler
def test_a_model_compiled_by_inductor_trains_as_its_twin():
    torch.manual_seed(0)
    model = Network(depth=1).double()
    twin = plain_twin(model)
    assert_steps_like(training_step(torch.compile(model)), model, training_step(twin), twin, steps=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_branches_train_as_those_of_the_twin_and_are_compiled_once(backend):
    torch.manual_seed(0)
    model = Network(depth=2, dropout=0.3).double()
    twin = compiled_branches(plain_twin(model), backend)  # inductor has dropout masks of its own
    compiled_branches(model, backend)
    assert_steps_like(training_step(model), model, training_step(twin), twin)
    assert counters["frames"]["ok"] == counters["frames"]["total"] <= 4, "more was compiled than the branches"


@pytest.mark.parametrize("broken", [False, True], ids=["one graph", "two graphs"])
def test_blocks_of_compiled_branches_show_the_compiler_their_two_evaluations_alone(broken):
    """The twin's step is the reference: one evaluation, with all frames that the compiler sees in it."""

    def frames(model: nn.Module) -> int:
        before = counters["frames"]["total"]
        training_step(model)(images())
        return counters["frames"]["total"] - before

    torch.manual_seed(0)
    model = Network(depth=2).double()
    for part in model.modules():
        if isinstance(part, Branch):
            part.broken = broken
    twin = compiled_branches(plain_twin(model), "aot_eager")
    assert frames(twin) > 0
    assert frames(compiled_branches(model, "aot_eager")) == 2 * frames(twin)


def test_a_compiled_training_step_trains_as_its_twin():
    torch.manual_seed(0)
    model = Network(depth=2).double()
    twin = plain_twin(model)
    step = torch.compile(training_step(model), backend="aot_eager")
    assert_steps_like(step, model, training_step(twin), twin)


@pytest.mark.parametrize("depth", [2, 5])
def test_a_block_breaks_the_graph_once(depth):
    model = Network(depth).double()
    training_step(torch.compile(model, backend="aot_eager"))(images())
    breaks = dict(counters["graph_break"])
    assert sum(breaks.values()) <= depth, breaks
    assert all("a reversible block runs uncompiled" in reason for reason in breaks), breaks


def test_evaluation_is_one_graph():
    model = Network().double().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        x = images(requires_grad=False)
        assert relative_error(compiled(x), model(x)) < tolerance(torch.float64)


def test_disabled_blocks_are_one_graph():
    torch.manual_seed(0)
    model = plain_twin(Network().double())
    twin = plain_twin(model)
    step = training_step(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_steps_like(step, model, training_step(twin), twin, steps=2)


@pytest.mark.parametrize("compiled", ["branches", "model"])
def test_compiled_blocks_are_flat_in_memory(compiled):
    def step_bytes(depth: int, disable: bool = False) -> int:
        chain = nn.Sequential(
            *(InvertibleModuleWrapper(AdditiveCoupling(Branch(4), Branch(4)), disable=disable) for _ in range(depth))
        )
        if compiled == "branches":
            model = compiled_branches(chain, "aot_eager")
        else:
            model = torch.compile(chain, backend="aot_eager")
        x = images(4, 8, 16, 16, dtype=torch.float32)
        step = training_step(model)
        step(x)
        with TensorMeter() as meter:
            step(x)
        return meter.peak_bytes

    stored = (step_bytes(6, disable=True) - step_bytes(2, disable=True)) / 4
    assert (step_bytes(12) - step_bytes(4)) / 8 < stored / 100


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_an_exported_program_is_that_of_the_twin(strict, training):
    model = Network(depth=2).double().train(training)
    twin = plain_twin(model)
    x = images(requires_grad=False)
    program = torch.export.export(model, (x,), strict=strict)
    wanted = torch.export.export(twin, (x,), strict=strict)
    assert [str(node.target) for node in program.graph.nodes] == [str(node.target) for node in wanted.graph.nodes]
    assert torch.equal(program.module()(x), wanted.module()(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_computes_what_the_model_does():
    model = Network(depth=2).double().eval()
    x = images(requires_grad=False)
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))


def test_a_step_on_fake_tensors_has_the_memory_of_a_step_on_real_ones():
    def step_bytes() -> int:
        torch.manual_seed(0)
        model = nn.Sequential(
            *(InvertibleModuleWrapper(AdditiveCoupling(Branch(), Branch(dropout=0.5))) for _ in range(3))
        )
        x = torch.randn(2, 6, 5, 4, requires_grad=True)
        with TensorMeter() as meter:
            model(x).sum().backward()
        assert x.grad is not None
        return meter.peak_bytes

    with FakeTensorMode():
        faked = step_bytes()
    assert faked == step_bytes()
