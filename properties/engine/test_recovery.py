"""After an error in a forward pass, a recomputation or a hook, all state is restored and training continues."""

import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine import retained
from memcnn.engine.again import ReplayContext
from memcnn.engine.chain import Value, thread_state
from memcnn.testing.tolerances import tolerance
from properties.devices import rng_state
from properties.support.blocks import Notes, net, rows
from properties.support.held import held_bytes, living
from properties.support.twin import assert_same, backward, block, plain_twin, run, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class Failing(nn.Module):
    """Draws random numbers, updates a buffer, and then raises at chosen evaluations, counted from 1."""

    def __init__(self, *evaluations: int, error: type[BaseException] = ArithmeticError):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("moved", torch.ones(()))
        self.evaluations, self.error = evaluations, error
        self.seen = Notes()

    def forward(self, x):
        self.seen.append(None)
        h = F.dropout(self.norm(self.linear(x)), 0.5)
        self.moved.mul_(2)
        if len(self.seen) in self.evaluations:
            raise self.error("planned")
        return h * self.moved.clone() / 4


def surroundings(module: nn.Module) -> dict:
    """All global state that an evaluation changes and must restore."""
    parts = list(module.modules())
    return {
        "recording": thread_state.recording,
        "storing": thread_state.storing,
        "passes": dict(retained.passes),
        "sources": thread_state.noted_sources,
        "pending reads": sum(value.pending_reads for value in living(Value)),
        "saved-tensor hooks": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "grad mode": torch.is_grad_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")],
        "modes": [(part.training, getattr(part, "track_running_stats", None)) for part in parts],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "hooks": [list(hooks.items()) for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)],
        "global hooks": list(torch_module._global_forward_hooks.items()),
        "parameters": [id(p) for p in module.parameters()],
        "buffers": [id(b) for b in module.buffers()],
    }


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in module.state_dict().items()} | {"generator": rng_state()}


def assert_in_order(module: nn.Module, twin: nn.Module, program=backward) -> None:
    """Assert that the module trains like the twin, in which no error occurred."""
    twin.load_state_dict(module.state_dict())
    module.zero_grad()
    assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=tolerance(torch.float64, depth=2))


def failing_chain(*evaluations: int, error: type[BaseException] = ArithmeticError) -> tuple[nn.Module, nn.Module]:
    """Return a chain whose second block fails, and its twin, which does not fail."""
    failing = Failing(*evaluations, error=error)
    failing.register_forward_hook(lambda module, inputs, output: None)
    module = nn.Sequential(block(net), InvertibleModuleWrapper(AdditiveCoupling(net(), failing))).double()
    twin = plain_twin(module)
    twin[1]._fn.Gm.evaluations = ()
    return module, twin


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_an_error_in_the_forward_pass_leaves_everything_in_order(error):
    module, twin = failing_chain(1, error=error)
    before = surroundings(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=False), pytest.raises(error):
        module(rows())
    assert surroundings(module) == before
    assert_in_order(module, twin)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt], ids=lambda error: error.__name__)
@pytest.mark.parametrize("retain_graph", [False, True], ids=["freed", "retained"])
def test_an_error_in_the_recomputation_leaves_everything_in_order(error, retain_graph):
    module, twin = failing_chain(2, error=error)
    before = surroundings(module)
    loss = weighted_sum(module(rows()))
    module.eval()
    module[1]._fn.Gm.linear.weight.requires_grad_(False)
    between, generator = surroundings(module), state(module)
    with pytest.raises(error):
        loss.backward(retain_graph=retain_graph)
    if loss.is_cuda:
        deadline = time.monotonic() + 5
        while retained.passes and time.monotonic() < deadline:
            time.sleep(0.01)  # on a GPU, autograd's thread releases the pass slightly later
    assert surroundings(module) == between
    for name, value in state(module).items():
        assert torch.equal(value, generator[name]), name
    module.train()
    module[1]._fn.Gm.linear.weight.requires_grad_(True)
    assert surroundings(module) == before
    assert_in_order(module, twin)


def test_a_retained_graph_is_differentiated_after_an_error():
    module, twin = failing_chain(2)
    x, twin_x = rows(), rows()
    losses = []
    for part, argument in ((module, x), (twin, twin_x)):
        torch.manual_seed(0)
        losses.append(weighted_sum(part(argument)))
    with pytest.raises(ArithmeticError):
        losses[0].backward(retain_graph=True)
    module.zero_grad()
    x.grad = None
    for loss in losses:
        loss.backward(retain_graph=True)
    for got, wanted in zip((x, *module.parameters()), (twin_x, *twin.parameters()), strict=True):
        assert (got.grad - wanted.grad).abs().max() <= 1e-10 * (1 + wanted.grad.abs().max())


@pytest.mark.parametrize(
    "make",
    [
        lambda failing: InvertibleModuleWrapper(AdditiveCoupling(failing, net())),
        lambda failing: InvertibleModuleWrapper(AdditiveCoupling(net(), failing)),
        lambda failing: ReversibleSequential(AdditiveCoupling(net(), net()), AdditiveCoupling(net(), failing)),
    ],
    ids=["F", "G", "sequence"],
)
@pytest.mark.parametrize(
    "instead",
    [lambda other, h: other(h), lambda other, h: h.sin(), lambda other, h: other(h.detach()).sum() * h.sin()],
    ids=["another block", "no block", "both"],
)
def test_the_input_of_a_block_that_failed_may_go_elsewhere(make, instead):
    """A program that catches the error and continues, for example with a smaller batch."""

    def program(module, x):
        first, failing, other = module
        h = first(x)
        with pytest.raises(ArithmeticError):
            failing(h)
        y = instead(other, h)
        weighted_sum(y).backward()
        return y

    module = nn.ModuleList([block(net), make(Failing(1)).double(), block(net)])
    twin = plain_twin(module)
    assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=tolerance(torch.float64, depth=2))


@pytest.mark.parametrize("retain_graph", [False, True], ids=["freed", "retained"])
def test_an_error_of_a_hook_between_blocks_leaves_everything_in_order(retain_graph):
    def fail(gradient):
        raise ArithmeticError("planned")

    module = nn.Sequential(block(net), block(net))
    twin = plain_twin(module)
    before = surroundings(module)
    middle = module[0](rows())
    middle.register_hook(fail)
    loss = weighted_sum(module[1](middle))
    held = held_bytes()
    with pytest.raises(ArithmeticError):
        loss.backward(retain_graph=retain_graph)
    assert surroundings(module) == before
    assert held_bytes() <= held
    assert_in_order(module, twin)


@pytest.mark.parametrize("at_once", [False, True], ids=["after the evaluation", "before it"])
def test_an_error_while_something_is_put_back_does_not_keep_the_rest_from_it(at_once):
    """The state that an evaluation sets for a while has many parts, and Ctrl-C may come at any of them."""
    put_back = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    def restore(undo: list[tuple]) -> None:
        undo += [(put_back.append, 1), (interrupt,), (put_back.append, 2), (interrupt,), (put_back.append, 3)]
        if at_once:
            raise ArithmeticError

    replay = SimpleNamespace(check_unchanged=lambda *_: None, restore=restore, generators=(), sets_parameters=False)
    with pytest.raises(KeyboardInterrupt), ReplayContext(replay, check_generators=True):
        pass
    assert put_back == [3, 2, 1]
