"""Compute a run that goes the direct way, forward and backward. direct.py explains it and the words used here."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from memcnn.engine.again import exchange
from memcnn.engine.chain import Link, Value, dense, evaluation_lock, rebuild, restrided
from memcnn.engine.couple import misfit_error
from memcnn.engine.identity import modified_input_error
from memcnn.engine.quiet import QuietReplay
from memcnn.engine.retained import start_link
from memcnn.engine.sums import AdditiveStep, minus, plus
from memcnn.engine.torch_private import (
    backward_hooks_run,
    current_backward_pass,
    gradients_of,
    never_compiled,
    never_compiled_within,
    remove_backward_hooks,
)

if TYPE_CHECKING:
    from memcnn.engine.direct import Plan


class DirectRun(Link):
    """A run of steps that autograd records as two nodes. Its sources are y1 and y2.

    Args:
        steps: the steps, in order.
        targets: the values of x1 and x2.
        replay: replays this evaluation of all branches.
        subtract: whether the branches are subtracted instead of added.
    """

    def __init__(self, steps: Sequence[AdditiveStep], targets: Sequence[Value], replay: QuietReplay, subtract: bool):
        super().__init__(targets)
        self.steps, self.replay = steps, replay
        self.apply_sum, self.undo_sum = (minus, plus) if subtract else (plus, minus)
        # without a cache, since autocast would keep the cast weights of the whole run
        replay.autocast = [(kind, dtype, enabled, False) for kind, dtype, enabled, _ in replay.autocast]
        plan: Plan = replay.snapshot.plan
        plan.select_trained(replay.snapshot, replay.parameter_states)
        self.plan = plan
        self.parameters, self.positions = plan.trained, plan.positions
        """The plan's lists as they are in this forward pass. The plan may replace them before a later one."""
        self.strides: list[tuple[int, ...]] = []
        """For each step, the strides of the tensor that its branch was evaluated on."""
        self.gradients: dict[int, list[Tensor]] = {}
        """The gradients of y1 and y2. The key is the number of the backward pass that computed them."""
        self.packed = 0
        """Number of tensors that ``RunStart`` has saved."""
        self.inputs: Sequence[Tensor] = ()
        """The rebuilt x1 and x2, while ``RunStart`` reads its saved tensors."""

    def evaluate(self, halves: list[Tensor]) -> None:
        """Replace x1 and x2 in ``halves`` by y1 and y2."""
        # autocast would keep the cast weights of all branches until its context ends
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            for (branch, changed), layers in zip(self.steps, self.plan.first_layers, strict=True):
                a, b = halves[changed], dense(halves[1 - changed])
                version = b._version
                h = b
                for layer in layers:
                    h = layer.forward(h)
                out = self.apply_sum(a, h)
                del h
                if b._version != version:
                    raise modified_input_error(type(branch).__name__)
                if out.shape != a.shape or out.dtype != a.dtype:
                    raise misfit_error(out, a, branch)
                self.strides.append(b.stride())
                halves[changed] = out
        finally:
            torch.set_autocast_cache_enabled(caches)

    def rebuild(self, keep_graph: bool) -> None:
        """Rebuild x1 and x2 when another link, such as the block before this run, needs them first."""
        if keep_graph:
            start_link()
        self._give(self.targets, self._undo_steps([False] * (2 + len(self.parameters)), [])[0], keep_graph)

    def differentiate(self, wanted: Sequence[bool], keep_graph: bool) -> list[Tensor | None]:
        """Return the gradients of x1, x2 and each parameter, None where they are not wanted. Restore x1 and x2."""
        if keep_graph:
            start_link()
        gradients = self.gradients.pop(current_backward_pass())
        halves, of_parameters = self._undo_steps(wanted, gradients, free_outputs=not keep_graph)
        self._give(self.targets, halves, keep_graph)
        of_inputs = [g if is_wanted else None for g, is_wanted in zip(gradients, wanted[:2], strict=True)]
        return [*of_inputs, *of_parameters]

    def differentiate_twice(self, wanted: Sequence[bool], inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Return the same gradients, computed with ``create_graph=True``.

        Args:
            wanted: as for ``differentiate``.
            inputs: the rebuilt x1 and x2, with their places in the outer graph.
        """
        again = self.replay.again()
        with evaluation_lock, again:
            # views: gradients are computed up to these, and second derivatives flow through them to what they alias
            stand_ins = [x.view_as(x) for x in (*inputs, *self.parameters)]
            self._register(stand_ins[2:], again.undo)
            halves = stand_ins[:2]
            for branch, changed in self.steps:
                halves[changed] = self.apply_sum(halves[changed], branch(dense(halves[1 - changed])))
        gradients = torch.autograd.grad(
            halves,
            [stand_in for stand_in, is_wanted in zip(stand_ins, wanted, strict=True) if is_wanted],
            self.gradients.pop(current_backward_pass()),
            create_graph=True,
            allow_unused=True,
        )
        remaining = iter(gradients)
        return [next(remaining) if is_wanted else None for is_wanted in wanted]

    def _undo_steps(
        self, wanted: Sequence[bool], gradients: list[Tensor], *, free_outputs: bool = False
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Undo all steps, from y1 and y2 to x1 and x2, and differentiate those whose gradients are wanted.

        Args:
            wanted: for x1, x2 and each parameter, whether its gradient is asked for.
            gradients: the gradients of y1 and y2. They are replaced by the gradients of x1 and x2.
            free_outputs: drop the tensors of y1 and y2.

        Returns:
            x1 and x2, None where nobody needs it, and for each parameter its gradient or None.
        """
        if not self.sources:
            raise RuntimeError(
                "Trying to backward through the graph a second time: what a run of reversible blocks was rebuilt from "
                "is freed; call the first backward with retain_graph=True"
            )
        of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        again = self.replay.again()
        with again, torch.set_grad_enabled(any(wanted)):
            leaves, branches = self._leaves(again.undo)
            halves: list[Tensor | None] = [value.read() for value in self.sources]
            if free_outputs:
                for value in self.sources:  # ``chain.rebuild`` still refers to the values, but needs no tensors
                    value.tensor = None
                self.sources = ()
            for i, (needs_gradient_of_b, own) in reversed([*enumerate(self._wanted_of_steps(wanted))]):
                # The half that step 0 changes is an input of the run. Rebuild it only if something still reads it,
                # or if the caller wants the inputs and no gradients.
                restore_a = i > 0 or not any(wanted) or self.targets[self.steps[i].changed]() is not None
                new = self._undo_step(
                    i, branches[i], halves, gradients, [leaves[n] for n in own], needs_gradient_of_b, restore_a
                )
                for n in reversed(own):
                    if (gradient := new.pop()) is not None:  # else a branch does not use this parameter
                        of_parameters[n] = gradient if of_parameters[n] is None else of_parameters[n] + gradient
                    del gradient
        return halves, of_parameters

    def _undo_step(
        self,
        i: int,
        layers: Sequence[nn.Module],
        halves: list[Tensor | None],
        gradients: list[Tensor],
        leaves: list[Tensor],
        needs_gradient_of_b: bool,
        restore_a: bool,
    ) -> list[Tensor]:
        """Undo step ``i``, which is y = a + F(b), and return the gradients of ``leaves``.

        Nothing is held longer than it is needed, which decides how many bytes a backward pass needs.

        Args:
            i: the number of the step.
            layers: the layers of its branch F.
            halves: y and b, where y is at position ``changed``. y is replaced by a.
            gradients: the gradients of y and b. What passes through F is added to the gradient of b. The gradient of y
                stays, because it is also the gradient of a.
            leaves: the parameters of F whose gradients are wanted.
            needs_gradient_of_b: whether the gradient of b is needed.
            restore_a: whether a is needed; None takes its place otherwise.
        """
        changed = self.steps[i].changed
        halves[1 - changed] = restrided(halves[1 - changed], self.strides[i])
        b = halves[1 - changed].detach().requires_grad_(needs_gradient_of_b)
        h = b
        for layer in layers:
            h = layer.forward(h)
        halves[changed] = self.undo_sum(halves[changed], h.detach()) if restore_a else None
        if not (needs_gradient_of_b or leaves):
            return []
        # Keep only the edge (the place of h in the graph), so that h itself can be freed. Constructing it ourselves is
        # faster than ``get_gradient_edge``, which we need in two cases: h is b, a leaf, or the node is written in
        # Python and only PyTorch's edge keeps it alive.
        node = h.grad_fn
        is_simple = node is not None and not isinstance(node, BackwardCFunction)
        edge = GradientEdge(node, h.output_nr) if is_simple else get_gradient_edge(h)
        del node
        del h
        inputs = [b, *leaves] if needs_gradient_of_b else leaves
        del b
        gradient = gradients[changed] if self.apply_sum is plus else -gradients[changed]
        of_inputs = gradients_of(edge, gradient, inputs)
        if not needs_gradient_of_b:
            return [*of_inputs]
        of_b, *of_leaves = of_inputs
        if of_b is not None:
            gradients[1 - changed] = gradients[1 - changed] + of_b
        return of_leaves

    def _wanted_of_steps(self, wanted: Sequence[bool]) -> list[tuple[bool, list[int]]]:
        """Return for each step whether the gradient of b is needed, and which parameters' gradients are wanted of it.

        The gradient of a half is needed if something is wanted that the half was computed from.
        """
        needed, of_steps = list(wanted[:2]), []
        for (_, changed), positions in zip(self.steps, self.positions, strict=True):
            own = [n for n in positions if wanted[2 + n]]
            of_steps.append((needed[1 - changed], own))
            needed[changed] = needed[changed] or needed[1 - changed] or bool(own)
        return of_steps

    def _leaves(self, undo: list[tuple]) -> tuple[Sequence[Tensor], Sequence[Sequence[nn.Module]]]:
        """Return the parameters of the second evaluation, and for each step the layers or modules to call.

        As a rule these are the parameters themselves and the bare layers; otherwise stand-ins and the branches.
        """
        if self.replay.full_replay is None and not backward_hooks_run(self.parameters):
            return self.parameters, self.plan.second_layers
        stand_ins = [p.detach().requires_grad_() for p in self.parameters]
        self._register(stand_ins, undo)
        return stand_ins, [[branch] for branch, _ in self.steps]

    def _register(self, stand_ins: Sequence[Tensor], undo: list[tuple]) -> None:
        """Register stand-ins in place of the parameters. ``undo`` receives the calls that put them back."""
        by_id = {id(p): stand_in for p, stand_in in zip(self.parameters, stand_ins, strict=True)}
        for root, survey in zip(self.replay.modules, self.replay.snapshot.surveys, strict=True):
            remove_backward_hooks([root, *survey.modules], undo)
            for registry, name, p in survey.parameters:
                if id(p) in by_id:
                    exchange(registry, name, by_id[id(p)], undo)

    @never_compiled
    def pack(self, _: Tensor) -> int:
        """Return 0 for x1, 1 for x2; autograd saves that number."""
        self.packed += 1
        return self.packed - 1

    @never_compiled_within
    def unpack(self, number: int) -> Tensor:
        """Return the rebuilt x1 or x2. Autograd connects it to the node that computed it in the forward pass.

        ``RunStart.backward`` has rebuilt them before. Elsewhere, as for ``grad_fn.saved_tensors``, rebuild them now.
        """
        return (self.inputs or self.rebuilt_inputs())[number]

    def rebuilt_inputs(self) -> Sequence[Tensor]:
        """Return x1 and x2, rebuilt and without a graph."""
        return rebuild(self, lambda _: self._undo_steps([False] * (2 + len(self.parameters)), [])[0])
