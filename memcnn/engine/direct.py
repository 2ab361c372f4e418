"""The direct way: two graph nodes for a run of quiet additive steps.

``CoupledBranch`` lets autograd record each branch and puts an empty ``Activation`` in place of each tensor that it
saves. Python then packs, collects and unpacks every saved tensor, which takes longer than small layers themselves. The
direct way saves nothing. For a run of blocks, y1 = x1 + F(x2) and y2 = x2 + G(y1):

==========  ==========================================================================================================
forward     ``RunStart`` becomes a node of the outer graph, whose inputs are x1, x2 and the parameters of all branches.
            The branches are evaluated without a graph, layer by layer (``bare_layers``). ``RunEnd`` is the node of the
            outputs y1 and y2.
backward    ``RunEnd`` hands the gradients of y1 and y2 to the run. ``RunStart`` takes the steps in reverse order: it
            evaluates h = G(y1) with a graph of its own, rebuilds x2 = y2 - h, and differentiates that graph, which
            autograd frees on the way; then the same for F. It returns the gradients of x1, x2 and the parameters. The
            outer pass hands them on: accumulation, hooks and distributed wrappers see what they expect.
==========  ==========================================================================================================

There are two nodes, because the gradients that a node receives live until it is done. Those of y1 and y2 would live as
long as the run. As attributes of the run they are freed after the first block. An empty tensor joins the nodes.

A run takes the direct way if all of this holds when it runs forward; otherwise each of its steps is a
``CoupledBranch``:

1. All branches are quiet (see ``survey``) and different ones, and their parameters are leaves.
2. Each step is y = a + F(b) or y = a - F(b) (``Sum``). The gradient of a is then that of y, and of F(b) up to sign.
3. The run is not within another branch, whose second evaluation has to find the same tensors.
4. Nothing is asked of the run beside its gradients: no stored or compared input, no grid, no keyword arguments, no
   half-precision stream, no drift watch over this evaluation, no anomaly mode (whose report names the operation that
   failed in the forward pass).
5. x1 and x2 require gradients, and no parameter has a gradient yet, or a hook. Otherwise the ordinary graph needs
   fewer bytes: it frees the gradient of y1 before the branch's last layers are differentiated, adds each gradient to
   the previous one, or calls the hook, as soon as it is there.

Whatever changes between forward and backward is restored or refused as in every other step, by ``QuietReplay``, once
for the run. If something has changed, or a parameter has got hooks, the second evaluation uses *stand-ins*: aliases of
the parameters, with their own gradients. So do second derivatives (``create_graph=True``), for which ``RunStart`` saves
x1 and x2 through a pair of hooks, which store nothing: autograd gives the rebuilt tensors their place in the outer
graph. The run is then evaluated once more from x1 and x2, as a part of that graph, with its activations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from memcnn.engine.again import exchange
from memcnn.engine.chain import Link, Value, dense, rebuild, rebuilding, restrided, thread_state
from memcnn.engine.couple import misfit
from memcnn.engine.drift import SAMPLED, Evaluations, evaluations
from memcnn.engine.identity import modified_input
from memcnn.engine.quiet import QuietReplay
from memcnn.engine.retained import start_link
from memcnn.engine.sums import minus, plus
from memcnn.engine.survey import Marks, Snapshot, bare_layers, snapshot
from memcnn.engine.torch_private import (
    GLOBAL_BACKWARD_HOOKS,
    backward_hooks_run,
    current_backward_pass,
    gradients_of,
    hooks_see_gradients,
    is_observed,
    never_compiled,
    never_compiled_within,
    remove_backward_hooks,
    wanted_by_pass,
)

LONGEST_RUN = 8
"""Number of blocks. The gradients of a run's parameters reach the outer pass together, and
``DistributedDataParallel`` sends them while the next ones are computed: a run must not be a whole network."""

_STREAMS = frozenset({torch.float32, torch.float64})


Halves = tuple[Tensor, Tensor]


class Sum(NamedTuple):
    """One additive step: ``branch``, evaluated on one half, changes the other, which is number ``changed`` (0 or 1)."""

    branch: nn.Module
    changed: int


def run_directly(steps: Sequence[Sum], halves: list[Tensor], *, subtract: bool) -> bool:
    """Replace x1 and x2 in ``halves`` by y1 and y2, if the steps can take the direct way. Return whether they have.

    Args:
        steps: the steps, in order.
        halves: holds x1 and x2.
        subtract: whether the branches are subtracted instead of added.
    """
    recording = thread_state.recording
    if recording is None or thread_state.noted_sources is not None or not steps:
        return False
    with rebuilding:
        if (replay := _replay_of(steps, halves, recording.options)) is None:
            return False
        run = DirectRun(steps, [recording.value(x) for x in halves], replay, subtract)
        halves[:] = run.forward(halves)
    run.complete([recording.value(y) for y in halves])
    return True


def _replay_of(steps: Sequence[Sum], halves: Sequence[Tensor], options: dict) -> QuietReplay | None:
    """Return what replays the branches if they can take the direct way, and count their evaluations; else None."""
    for x in halves:
        if type(x) is not Tensor or x.dtype not in _STREAMS or not x.requires_grad or not (x.is_cpu or x.is_cuda):
            return None
    if (
        options.get("keep_input")
        or options.get("check_inverse") is not None
        or torch.is_anomaly_enabled()
        or any(GLOBAL_BACKWARD_HOOKS)
        or is_observed()
    ):
        return None
    branches = [branch for branch, _ in steps]
    first = next(branches[0].parameters(), None)
    if first is not None and first.is_leaf and first.grad is not None:  # as a rule all others have one too
        return None
    if len({*branches}) < len(branches) or (found := snapshot(branches)) is None:
        return None
    if found.plan is None:
        found.plan = Plan(branches)
    counters = found.plan.evaluations
    if not SAMPLED.isdisjoint([counter.number + 1 for counter in counters]):
        return None
    for p in found.parameters:
        if not p.is_leaf or p.grad is not None:
            return None
    if hooks_see_gradients(found.parameters):
        return None
    for counter in counters:
        counter.number += 1
    return QuietReplay(branches, halves[:1], found)


class Plan:
    """The layers, parameters and counters of a run's branches. Kept with their snapshot, for the steps to come."""

    def __init__(self, branches: Sequence[nn.Module]):
        self.evaluations = [evaluations.setdefault(branch, Evaluations()) for branch in branches]
        self.first = [bare_layers(branch, tracking=True) for branch in branches]
        """For each step, the layers of its branch as the first evaluation needs them."""
        self.again = [bare_layers(branch, tracking=False) for branch in branches]
        """For each step, the layers of its branch as the second evaluation needs them."""
        self.required: list[bool] | None = None
        self.parameters: list[Tensor] = []
        """The trained parameters of all branches."""
        self.trained: list[list[int]] = []
        """For each step, where its branch's trained parameters stand among them."""

    def choose(self, found: Snapshot, marks: Marks) -> None:
        """Set which parameters are trained, from the marks of all of them."""
        required = [requires_grad for requires_grad, _, _ in marks]
        if required == self.required:
            return
        remaining = iter(required)
        trained = [[p for p in survey.owned[2::3] if next(remaining)] for survey in found.surveys]
        self.parameters = [*{id(p): p for parameters in trained for p in parameters}.values()]
        position = {id(p): i for i, p in enumerate(self.parameters)}
        self.trained = [[*{position[id(p)]: None for p in parameters}] for parameters in trained]
        self.required = required


class DirectRun(Link):
    """A run of steps that autograd records as two nodes. Its sources are y1 and y2.

    Args:
        steps: the steps, in order.
        targets: the values of x1 and x2.
        replay: of this evaluation of all branches.
        subtract: whether the branches are subtracted instead of added.
    """

    def __init__(self, steps: Sequence[Sum], targets: Sequence[Value], replay: QuietReplay, subtract: bool):
        super().__init__(targets)
        self.steps, self.replay = steps, replay
        self.join, self.part = (minus, plus) if subtract else (plus, minus)
        # without a cache, since autocast would keep the cast weights of the whole run
        replay.autocast = [(kind, dtype, enabled, False) for kind, dtype, enabled, _ in replay.autocast]
        plan: Plan = replay.found.plan
        plan.choose(replay.found, replay.marks)
        self.plan, self.parameters, self.trained = plan, plan.parameters, plan.trained
        self.strides: list[tuple[int, ...]] = []
        """For each step, the strides of the tensor that its branch was evaluated on."""
        self.gradients: dict[int, list[Tensor]] = {}
        """The gradients of y1 and y2. The key is the number of the backward pass that computed them."""
        self.packed = 0
        """How many tensors ``RunStart`` has saved."""
        self.unpacked: Sequence[Tensor] = ()
        """x1 and x2, while ``RunStart`` takes its saved tensors."""

    def forward(self, halves: Sequence[Tensor]) -> Halves:
        """Return y1 and y2, with their place in the graph. ``halves`` are x1 and x2."""
        ends: list[Tensor] = []
        with saved_tensors_hooks(self._pack, self._unpack):
            token = RunStart.apply(self, ends, *halves, *self.parameters)
        return RunEnd.apply(self, ends, token)

    def evaluate(self, halves: list[Tensor]) -> None:
        """Replace x1 and x2 in ``halves`` by y1 and y2."""
        # autocast would keep the cast weights of all branches until its context ends
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            for (branch, changed), layers in zip(self.steps, self.plan.first, strict=True):
                a, b = halves[changed], dense(halves[1 - changed])
                version = b._version
                h = b
                for layer in layers:
                    h = layer.forward(h)
                out = self.join(a, h)
                del h
                if b._version != version:
                    raise modified_input(type(branch).__name__)
                if out.shape != a.shape or out.dtype != a.dtype:
                    raise misfit(out, a, branch)
                self.strides.append(b.stride())
                halves[changed] = out
        finally:
            torch.set_autocast_cache_enabled(caches)

    def rebuild(self, keep_graph: bool) -> None:
        """Restore x1 and x2 for another link, which needs them before this run is differentiated."""
        if keep_graph:
            start_link()
        self._give(self.targets, self._taken_back([False] * (2 + len(self.parameters)), [])[0], keep_graph)

    def differentiate(self, wanted: Sequence[bool], keep_graph: bool) -> list[Tensor | None]:
        """Return the gradients of x1, x2 and each parameter, None where they are not wanted. Restore x1 and x2."""
        if keep_graph:
            start_link()
        gradients = self.gradients.pop(current_backward_pass())
        halves, found = self._taken_back(wanted, gradients, frees=not keep_graph)
        self._give(self.targets, halves, keep_graph)
        return [*(g if is_wanted else None for g, is_wanted in zip(gradients, wanted, strict=False)), *found]

    def differentiate_twice(self, wanted: Sequence[bool], starts: Sequence[Tensor]) -> list[Tensor | None]:
        """Do the same with a graph. ``starts`` are the rebuilt x1 and x2, with their places in the outer graph."""
        again = self.replay.again()
        with rebuilding, again:
            leaves = [x.view_as(x) for x in (*starts, *self.parameters)]
            self._exchange(leaves[2:], again.undo)
            halves = leaves[:2]
            for branch, changed in self.steps:
                halves[changed] = self.join(halves[changed], branch(dense(halves[1 - changed])))
        found = torch.autograd.grad(
            halves,
            [leaf for leaf, is_wanted in zip(leaves, wanted, strict=True) if is_wanted],
            self.gradients.pop(current_backward_pass()),
            create_graph=True,
            allow_unused=True,
        )
        remaining = iter(found)
        return [next(remaining) if is_wanted else None for is_wanted in wanted]

    def _taken_back(
        self, wanted: Sequence[bool], gradients: list[Tensor], *, frees: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Take the steps back, from y1 and y2 to x1 and x2.

        Args:
            wanted: for x1, x2 and each parameter, whether its gradient is asked for.
            gradients: those of y1 and y2, replaced by those of x1 and x2.
            frees: forget y1 and y2.

        Returns:
            x1 and x2, None where nobody waits for it, and for each parameter its gradient or None.
        """
        if not self.sources:
            raise RuntimeError(
                "Trying to backward through the graph a second time: what a run of reversible blocks was rebuilt from "
                "is freed; call the first backward with retain_graph=True"
            )
        found: list[Tensor | None] = [None] * len(self.parameters)
        again = self.replay.again()
        with again, torch.set_grad_enabled(any(wanted)):
            leaves, branches = self._leaves(again.undo)
            halves: list[Tensor | None] = [value.read() for value in self.sources]
            if frees:
                for value in self.sources:  # whoever waits for the run holds them
                    value.tensor = None
                self.sources = ()
            for i, (reached, own) in reversed([*enumerate(self._asked(wanted))]):
                restores = i > 0 or not any(wanted) or self.targets[self.steps[i].changed]() is not None
                new = self._take_back(i, branches[i], halves, gradients, [leaves[n] for n in own], reached, restores)
                for n in reversed(own):
                    if (gradient := new.pop()) is not None:  # else a branch does not use this parameter
                        found[n] = gradient if found[n] is None else found[n] + gradient
                    del gradient
        return halves, found

    def _take_back(
        self,
        i: int,
        layers: Sequence[nn.Module],
        halves: list[Tensor | None],
        gradients: list[Tensor],
        leaves: list[Tensor],
        reached: bool,
        restores: bool,
    ) -> list[Tensor]:
        """Take step ``i`` back, and return the gradients of ``leaves``. ``halves`` and ``gradients`` are changed.

        Nothing is held longer than it is needed, which decides how many bytes a backward pass needs.
        """
        changed = self.steps[i].changed
        halves[1 - changed] = restrided(halves[1 - changed], self.strides[i])
        b = halves[1 - changed].detach().requires_grad_(reached)
        h = b
        for layer in layers:
            h = layer.forward(h)
        halves[changed] = self.part(halves[changed], h.detach()) if restores else None
        if not (reached or leaves):
            return []
        edge = GradientEdge(h.grad_fn, h.output_nr) if h.grad_fn is not None else get_gradient_edge(h)
        del h
        inputs = [b, *leaves] if reached else leaves
        del b
        gradient = gradients[changed] if self.join is plus else -gradients[changed]
        first, *rest = gradients_of(edge, gradient, inputs)
        if not reached:
            return [first, *rest]
        if first is not None:
            gradients[1 - changed] = gradients[1 - changed] + first
        return rest

    def _asked(self, wanted: Sequence[bool]) -> list[tuple[bool, list[int]]]:
        """Return for each step whether the gradient of b is asked for, and which of the parameters' are."""
        reached, asked = list(wanted[:2]), []
        for (_, changed), trained in zip(self.steps, self.trained, strict=True):
            own = [n for n in trained if wanted[2 + n]]
            asked.append((reached[1 - changed], own))
            reached[changed] = reached[changed] or reached[1 - changed] or bool(own)
        return asked

    def _leaves(self, undo: list[tuple]) -> tuple[Sequence[Tensor], Sequence[Sequence[nn.Module]]]:
        """Return the parameters of the second evaluation, as a rule those of the first, and the layers of each step."""
        if self.replay.changed is None and not backward_hooks_run(self.parameters):
            return self.parameters, self.plan.again
        leaves = [p.detach().requires_grad_() for p in self.parameters]
        self._exchange(leaves, undo)
        return leaves, [[branch] for branch, _ in self.steps]

    def _exchange(self, stand_ins: Sequence[Tensor], undo: list[tuple]) -> None:
        """Register stand-ins in place of the parameters. ``undo`` receives the calls that put them back."""
        by_id = {id(p): stand_in for p, stand_in in zip(self.parameters, stand_ins, strict=True)}
        for root, found in zip(self.replay.modules, self.replay.found.surveys, strict=True):
            remove_backward_hooks([root, *found.modules], undo)
            for registry, name, p in zip(found.owned[::3], found.owned[1::3], found.owned[2::3], strict=True):
                if id(p) in by_id:
                    exchange(registry, name, by_id[id(p)], undo)

    @never_compiled
    def _pack(self, _: Tensor) -> int:
        """Save the number of the half in place of it."""
        self.packed += 1
        return self.packed - 1

    @never_compiled_within
    def _unpack(self, number: int) -> Tensor:
        """Return the rebuilt x1 or x2. Autograd connects it to the node that computed it in the forward pass."""
        return (self.unpacked or self.starts())[number]

    def starts(self) -> Sequence[Tensor]:
        """Return x1 and x2, rebuilt and without a graph."""
        return rebuild(self, lambda _: self._taken_back([False] * (2 + len(self.parameters)), [])[0])


class RunStart(torch.autograd.Function):
    """The node of x1, x2 and the parameters. It returns an empty tensor, and lets ``RunEnd`` return y1 and y2."""

    @staticmethod
    def forward(ctx: Any, run: DirectRun, ends: list[Tensor], x1: Tensor, x2: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x1, x2)
        ends += (x1, x2)
        run.evaluate(ends)
        return x1.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        run, wanted = ctx.run, wanted_by_pass(ctx.next_functions)
        if not torch.is_grad_enabled():
            return None, None, *rebuild(run, partial(run.differentiate, wanted))
        run.unpacked = run.starts()
        try:
            starts = ctx.saved_tensors
        finally:
            run.unpacked = ()
        return None, None, *run.differentiate_twice(wanted, starts)


class RunEnd(torch.autograd.Function):
    """The node of y1 and y2."""

    @staticmethod
    def forward(ctx: Any, run: DirectRun, ends: list[Tensor], token: Tensor) -> Halves:
        ctx.run = run
        y1, y2 = ends
        ends.clear()
        return y1, y2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        ctx.run.gradients[current_backward_pass()] = list(gradients)
        return None, None, gradients[0].new_empty(0)
