"""Plain attributes that are tensors, containers or functions are those of the forward pass in the recomputation."""

import gc
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from memcnn.engine.replay import Replay
from properties.support.blocks import refused, rows
from properties.support.held import living
from properties.support.scaled import PROGRAMS, Scaled, chain
from properties.support.twin import assert_like_twin, assert_same, backward, block, plain_twin, run, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


Pair = namedtuple("Pair", "scale other")


class Contextual(Scaled):
    """Scales by ``context``, which may be of any type."""

    def __init__(self):
        super().__init__()
        self.context = None

    def scale(self, x):
        return scale_of(self.context, x)


def scale_of(context, x):
    """Return the number or tensor in a context of any type."""
    if callable(context):
        return context(x)
    if isinstance(context, dict):
        return scale_of(context["scale"], x)
    if isinstance(context, set | frozenset):
        return len(context)
    if isinstance(context, slice):
        return context.stop
    if isinstance(context, list | tuple | deque | bytearray | range):
        return scale_of(context[0], x)
    return float(context) if isinstance(context, Fraction | np.number) else context


def vector(value: float) -> Tensor:
    return torch.full((3,), value, dtype=torch.float64)


def graph(value: float) -> Tensor:
    return vector(value).requires_grad_().exp()


CONTEXTS = {
    "tensor": (lambda: vector(2), lambda _: vector(5)),
    "tensor with a graph": (lambda: graph(0.2), lambda _: graph(0.9)),
    "tensor, later a number": (lambda: vector(2), lambda _: 5.0),
    "function": (lambda: torch.sin, lambda _: torch.cos),
    "tuple": (lambda: (2.0, "a"), lambda _: (5.0, "a")),
    "list": (lambda: [2.0], lambda then: then.__setitem__(0, 5.0) or then),
    "list of tensors": (lambda: [vector(2)], lambda then: then.__setitem__(0, vector(5)) or then),
    "dictionary": (lambda: {"scale": 2.0}, lambda then: then.update(scale=5.0) or then),
    "set": (lambda: {1, 2}, lambda then: then.add(3) or then),
    "deque": (lambda: deque([2.0]), lambda then: then.appendleft(5.0) or then),
    "tuple of tensors": (lambda: (vector(2), vector(3)), lambda _: (vector(5), vector(3))),
    "tuple of tensors with graphs": (lambda: (graph(0.2), graph(0.3)), lambda _: (graph(0.9), graph(0.3))),
    "named tuple": (lambda: Pair(2.0, vector(1)), lambda then: then._replace(scale=5.0)),
    "number of NumPy": (lambda: np.float64(2), lambda _: np.float64(5)),
    "integer of NumPy": (lambda: np.int64(2), lambda _: np.int64(5)),
    "fraction": (lambda: Fraction(1, 2), lambda _: Fraction(5, 2)),
    "size": (lambda: torch.Size([2]), lambda _: torch.Size([5])),
    "range": (lambda: range(2, 9), lambda _: range(5, 9)),
    "slice": (lambda: slice(2), lambda _: slice(5)),
    "frozen set": (lambda: frozenset({1, 2}), lambda then: then | {3}),
    "array of bytes": (lambda: bytearray([2]), lambda then: then.__setitem__(0, 5) or then),
    "ordered dictionary": (lambda: OrderedDict(scale=2.0), lambda then: then.update(scale=5.0) or then),
    "dictionary with a default": (lambda: defaultdict(lambda: 2.0), lambda then: then.update(scale=5.0) or then),
    "counter": (lambda: Counter(scale=2), lambda then: then.update(scale=3) or then),
    "list in a dictionary": (lambda: {"scale": [2.0]}, lambda then: then["scale"].__setitem__(0, 5.0) or then),
    "list in a tuple": (lambda: ([2.0],), lambda then: then[0].__setitem__(0, 5.0) or then),
    "tensor with a graph in a list": (lambda: [graph(0.2)], lambda _: [graph(0.9)]),
    "None, later a tuple of tensors": (lambda: lambda x: 2.0, lambda _: (vector(5), vector(3))),
}


@pytest.mark.parametrize(("make", "change"), CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_that_changes_between_forward_and_backward_is_replayed(make, change):
    def program(module: nn.Module, x: Tensor) -> Tensor:
        branch = module._fn.Fm
        branch.context, module._fn.Gm.context = make(), make()
        y = module(x)
        branch.context = now = change(branch.context)
        weighted_sum(y).backward()
        assert branch.context is now
        return y

    assert_like_twin(block(Contextual), program, rows())


def test_a_context_for_each_step_of_a_loop_is_replayed_and_gets_its_gradient():
    def program(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        for k in range(3):
            module._fn.Fm.context = module._fn.Gm.context = (context[:, :3] * k).tanh()
            x = module(x)
        weighted_sum(x).backward()
        return x

    assert_like_twin(block(Contextual), program, rows(), rows())


def test_a_tensor_that_changes_in_place_between_forward_and_backward_is_noticed():
    changes = [lambda t: t.mul_(2), lambda t: t.data.mul_(2)]
    if torch.get_default_device().type == "cuda":
        changes.pop()  # there the value of the forward pass is put back for the recomputation
    for change in changes:
        module = block(Contextual)
        module._fn.Fm.context, module._fn.Gm.context = vector(2), vector(2)
        y = module(rows())
        change(module._fn.Gm.context)
        with refused(RuntimeError, "the attribute 'context' of shape (3,) was modified between forward and backward"):
            weighted_sum(y).backward()


class Averaging(Scaled):
    """Updates an average, a plain tensor, in place, and appends to a history at every call."""

    def __init__(self):
        super().__init__()
        self.average, self.history = vector(1), []

    def scale(self, x):
        self.average.mul_(0.5).add_(x.detach().mean())
        self.history.append(float(self.average[0]))
        return self.average + len(self.history)


class Remembering(Scaled):
    """Scales by a value of the previous call, which has its graph if ``graph`` is set."""

    graph = False

    def __init__(self):
        super().__init__()
        self.state = None

    def scale(self, x):
        scale = 1.0 if self.state is None else 1 + self.state.detach().mean() ** 2
        self.state = x if self.graph else x.detach()
        return scale


class RememberingGraphs(Remembering):
    graph = True


class RememberingPairs(Remembering):
    """Keeps a pair, like an LSTM. Before the first call the attribute does not exist."""

    def __init__(self):
        super().__init__()
        del self.state

    def scale(self, x):
        hidden, cell = getattr(self, "state", (x.detach(), x.detach()))
        self.state = (0.5 * hidden + x.detach(), cell.sin())
        return 1 + (hidden * cell).mean() ** 2


class Annealed(Scaled):
    """Scales by a number of NumPy that every call changes."""

    def __init__(self):
        super().__init__()
        self.temperature = np.float64(1)

    def scale(self, x):
        self.temperature = np.maximum(0.25, self.temperature * np.exp(-0.3))
        return float(self.temperature)


@pytest.fixture(autouse=True)
def graphs_are_forgotten():
    """A module, its state and the graph of that hold each other, through nodes that Python's collector cannot see."""
    yield
    for module in living(RememberingGraphs):
        module.state = None


@PROGRAMS
@pytest.mark.parametrize("branch", [Averaging, Remembering, RememberingGraphs, RememberingPairs, Annealed])
def test_what_a_branch_keeps_from_call_to_call_moves_once_a_step_and_is_replayed(program, branch):
    module = chain(branch)
    twin = plain_twin(module)
    for _ in range(2):
        assert_same(run(module, program, [rows()]), run(twin, program, [rows()]), limit=1e-10)
    if branch is Averaging:
        for got, wanted in zip(module, twin, strict=True):
            torch.testing.assert_close(got._fn.Fm.average, wanted._fn.Fm.average)
            torch.testing.assert_close(got._fn.Fm.history, wanted._fn.Fm.history)


def test_a_branch_that_remembers_graphs_keeps_no_chain_of_evaluations_alive():
    module = block(RememberingGraphs)
    counts = []
    for _ in range(4):
        module(rows())
        gc.collect()
        counts.append(len(living(Replay)))
    assert counts[1:] == counts[:-1]


def test_a_list_of_objects_that_are_no_tensors_is_left_alone():
    class Listing(Scaled):
        def __init__(self):
            super().__init__()
            self.parts = [object(), None, 2.0]

        def scale(self, x):
            return self.parts[-1]

    assert_like_twin(block(Listing), backward, rows())
