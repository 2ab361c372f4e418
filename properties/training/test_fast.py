"""Every execution of a step computes the results of the plain step, and a resumed run ends with the same bits."""

import functools
import os
import re
import signal
import time
import warnings

import pytest
import torch
import torch.nn.functional as F

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.testing.tolerances import relative_error, tolerance
from memcnn.training.execution import Execution
from memcnn.training.recipe import override
from memcnn.training.record import run_name
from memcnn.training.step import TrainingStep
from properties.devices import needs_cuda, waiting_is_an_error
from properties.support.capture import graphs_on_cpu
from properties.support.executions import BF16, COMPILED, CPU, GRAPH, PLAIN, SMALL, Reading, small_resnet, small_revnet
from properties.support.runs import DATA, NAME, RECIPE, assert_same_run, checkpoint_of, run, stopped_after

pytestmark = [
    pytest.mark.usefixtures("tiny_runs"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # the compiler
]
FAST = [GRAPH, COMPILED, BF16]
STEPS = 5


@pytest.fixture
def executable(monkeypatch):
    """Allow every execution on this machine, with CUDA graphs simulated on the CPU and a fast compiler backend."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # graphs are simulated on a CPU
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(Execution, "on", lambda self, device, *, processes: (self, []))
    with graphs_on_cpu(monkeypatch) as graphs:
        yield graphs


def train_steps(make, execution: Execution, *, device: torch.device = CPU, steps: int = STEPS):
    """Return the losses of some steps, shape (steps,), and the ``TrainingStep`` afterwards."""
    data = DATA.to(device)
    torch.manual_seed(0)
    model = make().to(device, memory_format=torch.channels_last)
    step = TrainingStep(model, SMALL, data, execution)
    plan = cifar.epoch_plan(0, 0, 40, pad=2, flip=True).to(device)
    losses = []
    with execution.settings(device):
        for i in range(steps):
            before = step.totals.clone()
            batch = plan.part(8 * (i % 5), 8 * (i % 5) + 8)
            step(batch, SMALL.learning_rate_after(i))
            losses.append((step.totals - before)[0])
    return torch.stack(losses), step


def assert_like_plain(make, execution: Execution, limit: float, device: torch.device = CPU) -> None:
    losses, step = train_steps(make, execution, device=device)
    plain_losses, plain = train_steps(make, PLAIN, device=device)
    assert relative_error(losses, plain_losses) <= limit
    assert losses.unique().numel() == STEPS, "the weights must change, or every execution looks right"
    for got, wanted in zip(step.model.state_dict().items(), plain.model.state_dict().items(), strict=True):
        assert relative_error(got[1], wanted[1]) <= limit, got[0]
    assert step.iteration == plain.iteration == STEPS
    assert step.first_bad_loss.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "execution"),
    [(small_revnet, GRAPH), (small_resnet, GRAPH), (small_revnet, COMPILED)],
    ids=["RevNet, graph", "ResNet, graph", "RevNet, compile"],
)
def test_a_captured_or_compiled_step_trains_as_the_plain_one(executable, make, execution):
    assert_like_plain(make, execution, tolerance(torch.float32, depth=STEPS))


def test_a_step_is_captured_once_and_then_replayed(executable):
    _, step = train_steps(small_revnet, GRAPH)
    assert len(executable) == 1
    assert step.run == executable[0].replay


@pytest.mark.parametrize("make", [small_revnet, small_resnet])
def test_bf16_changes_losses_only_by_rounding(executable, make):
    losses, _ = train_steps(make, BF16)
    plain_losses, _ = train_steps(make, PLAIN)
    error = relative_error(losses, plain_losses)
    assert 0 < error <= STEPS * torch.finfo(torch.bfloat16).eps


def test_under_bf16_a_revnets_gradients_are_those_of_its_twin(executable):
    """The stream that is inverted is float32, so that both round in the same places; a bf16 stream is 30 % off."""
    gradients = []
    for disable in (False, True):
        _, step = train_steps(functools.partial(small_revnet, disable=disable), BF16, steps=1)
        gradients.append(torch.cat([p.grad.flatten() for p in step.model.parameters()]))
    assert relative_error(*gradients) <= 4 * torch.finfo(torch.bfloat16).eps


def test_the_first_iteration_with_a_nan_loss_is_recorded(executable):
    for execution in (PLAIN, GRAPH):
        _, step = train_steps(small_resnet, execution, steps=2)
        step.load_state_dict(step.state_dict(), iteration=7)
        step.model.head[-1].bias.data.fill_(torch.inf)
        plan = cifar.epoch_plan(0, 0, 40, pad=2, flip=True)
        for i in range(2):
            step(plan.part(8 * i, 8 * i + 8), 0.1)
        iteration, loss = step.first_bad_loss.tolist()
        assert iteration == 8 and loss != loss


@pytest.mark.parametrize("make", [small_revnet, small_resnet])
@pytest.mark.parametrize("execution", [PLAIN, BF16], ids=str)
def test_nothing_in_a_step_waits_for_the_device(make, execution):
    _, step = train_steps(make, execution, steps=1)
    plan = cifar.epoch_plan(0, 0, 40, pad=2, flip=True)
    with Reading() as reading:
        step(plan.part(8, 16), 0.1)
    assert reading.found == []


@pytest.mark.parametrize("execution", FAST, ids=str)
def test_resuming_gives_the_same_bits_however_steps_are_executed(tmp_path, executable, monkeypatch, execution):
    if execution == GRAPH:
        monkeypatch.setitem(MODELS, "resnet32", small_revnet)
    run(tmp_path / "whole", execution=execution)
    with stopped_after(10):  # five steps, three parts of an evaluation, two steps
        assert run(tmp_path / "parts", execution=execution).reason == "interrupted"
    record = run(tmp_path / "parts", execution=execution)
    assert (record.status, record.interruptions) == ("complete", 1)

    assert_same_run(tmp_path / "parts" / NAME, tmp_path / "whole" / NAME)


def test_capturing_is_announced_and_is_not_training_time(tmp_path, executable, capsys, monkeypatch):
    prepare = TrainingStep.prepare

    def slow(self, *arguments):
        time.sleep(0.5 if self.preparation else 0)
        prepare(self, *arguments)

    monkeypatch.setattr(TrainingStep, "prepare", slow)
    record = run(tmp_path, execution=GRAPH, progress=True)
    assert record.status == "complete" and record.train_seconds < 0.4
    said = capsys.readouterr().err
    assert "Capturing resnet32 ..." in said and re.search(r"Capturing resnet32: \d s", said)


@pytest.mark.parametrize("fails", [False, True], ids=["the compiler continues", "the signal stops the compiler too"])
def test_a_signal_while_compiling_stops_the_run_and_loses_nothing(tmp_path, executable, fails):
    prepare = TrainingStep.prepare

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        if fails:
            raise RuntimeError("a process of the compiler was killed")
        prepare(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingStep, "prepare", interrupted)
        record = run(tmp_path, execution=GRAPH)
    assert (record.status, record.reason, record.iterations) == ("partial", "interrupted", 0)
    assert run(tmp_path, execution=GRAPH).status == "complete"


def test_a_run_may_resume_with_another_execution(tmp_path, executable):
    recipe = override(RECIPE, learning_rate=0.01)
    name = run_name("resnet32", "cifar10", recipe, 0, data="generated")
    run(tmp_path / "plain", recipe=recipe)
    with stopped_after(3):
        run(tmp_path / "mixed", recipe=recipe, execution=GRAPH)
    run(tmp_path / "mixed", recipe=recipe, allow_mixed=True)
    state, expected = (checkpoint_of(tmp_path / folder / name) for folder in ("mixed", "plain"))
    for got, wanted in zip(state["model"].values(), expected["model"].values(), strict=True):
        assert relative_error(got, wanted) <= tolerance(torch.float32, depth=recipe.iterations)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"precision": "bf16", "graph": True}, "bf16, graph"), ({"deterministic": True}, "float32, deterministic")],
)
def test_the_record_has_the_execution_of_steps(tmp_path, executable, options, words):
    record = run(tmp_path, execution=Execution(**options))
    assert record.software["execution"] == record.segments[0].execution == words


@needs_cuda
@pytest.mark.parametrize("make", [small_revnet, small_resnet])
@pytest.mark.parametrize(
    "execution", [GRAPH, Execution(precision="tf32"), Execution(graph=True, precision="bf16")], ids=str
)
def test_on_cuda_steps_are_like_the_plain_ones_and_wait_for_nothing(make, execution):
    limit = STEPS * torch.finfo(torch.bfloat16).eps
    if execution.precision == "float32":
        limit = tolerance(torch.float32, depth=STEPS)
    device = torch.device("cuda")
    losses, step = train_steps(make, execution, device=device)
    plain_losses, _ = train_steps(make, PLAIN, device=device)
    assert relative_error(losses, plain_losses) <= limit
    plan = cifar.epoch_plan(0, 0, 40, pad=2, flip=True).to(device)
    with waiting_is_an_error():
        step(plan.part(0, 8), 0.1)


def test_waiting_is_an_error_only_where_it_is_asked_for(monkeypatch):
    """The mode is simulated: like PyTorch, setting it warns."""
    mode = 1

    def set_mode(value: int | str) -> None:
        nonlocal mode
        mode = {"default": 0, "warn": 1, "error": 2}.get(value, value)
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect all", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode)
    with pytest.raises(ArithmeticError), waiting_is_an_error():
        assert mode == 2
        raise ArithmeticError
    assert mode == 1
    with pytest.raises(UserWarning, match="another"), waiting_is_an_error():
        warnings.warn("another warning", stacklevel=2)
    assert mode == 1


def test_a_fused_update_is_the_textbook_one():
    """v = 0.9 v + g + 2e-4 w, w = w - 0.1 v, the published update."""
    model = small_resnet().to(memory_format=torch.channels_last)
    step = TrainingStep(model, RECIPE, DATA, PLAIN)
    assert step.optimizer.defaults["fused"]
    weights = [p.detach().clone().double() for p in model.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    plan = cifar.epoch_plan(0, 0, 40, pad=2, flip=True)
    for i in range(3):
        part = plan.part(8 * i, 8 * i + 8)
        images, labels = cifar.batch(DATA, part, pad=2)
        twin = small_resnet().to(memory_format=torch.channels_last)
        twin.load_state_dict(model.state_dict())
        F.cross_entropy(twin(images.contiguous(memory_format=torch.channels_last)), labels).backward()
        step(part, 0.1)
        for j, p in enumerate(twin.parameters()):
            velocities[j] = 0.9 * velocities[j] + p.grad.double() + 2e-4 * weights[j]
            weights[j] = weights[j] - 0.1 * velocities[j]
    for got, wanted in zip(model.parameters(), weights, strict=True):
        assert relative_error(got, wanted) <= tolerance(torch.float32)
