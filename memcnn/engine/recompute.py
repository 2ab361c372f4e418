"""The idea: run forward as usual, forget the activations, and rebuild them when backward asks for them.

Rules

1. The forward pass of a branch is the ordinary one. Autograd records it, so that hooks, gradient accumulators and
   distributed wrappers see the ordinary graph.
2. What the graph would save is dropped. An ``Activation`` without a tensor is saved in its place, by
   ``torch.autograd.graph.saved_tensors_hooks``. Parameters are saved as they are: they exist anyway.
3. A ``Value`` is one tensor of the chain of blocks. Once a step has consumed it, it holds the step in place of its
   tensor, and the step can rebuild it. So a chain of any length stores its end alone.
4. When backward first asks a step for an activation, the step evaluates its branch once more, on the branch's own
   input. This second evaluation saves the same tensors in the same order: each goes to its activation. With the output
   of the same evaluation the step undoes its sum (or affine map), which rebuilds the value that it had consumed.
5. The second evaluation sees what the first saw: strides, random numbers, autocast, modes, buffers, attributes, hooks
   (``replay``). What it computes is compared with the first in number, shape and dtype. What differs is an error, never
   a wrong gradient. A few evaluations are also compared in value (``drift``); docs/limits.md lists what is left.
6. Blocks may be nested. The ends of chains within a branch are forgotten as activations are, and rebuilt with them.
7. No tensor that the user can see is written to. References point from a value to its step to the step's sources, and
   never back: reference counting alone frees everything.
8. Under ``retain_graph=True`` what is rebuilt is kept for a while only (``retained``), and rebuilt again if needed.

Example: the additive step y1 = x1 + F(x2)

==========  ==========================================================================================================
forward     F(x2) is evaluated. Autograd wants to save the tensors s1, ..., sn within F; it is given the activations
            a1, ..., an (rule 2). The value of x1 now holds the step, whose sources are the values of y1 and x2. x1 has
            no tensor any more, unless the caller holds it (rule 3).
            The step y2 = x2 + G(y1) then takes x2 in the same way. The values of y1 and y2 are the chain's end.
backward    Autograd differentiates G first, and asks for an activation in G. The step of G evaluates h = G(y1), fills
            its activations and rebuilds x2 = y2 - h (rule 4). Autograd uses the activations and frees them.
            Then autograd differentiates F and asks for a1. The step of F evaluates h = F(x2), fills a1, ..., an, and
            rebuilds x1 = y1 - h, which the block before this one is waiting for.
==========  ==========================================================================================================

This is the algorithm of Gomez et al., "The Reversible Residual Network", arXiv:1707.04585.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memcnn.engine.capture import refuse_capture
from memcnn.engine.chain import Link, Value, rebuild, thread_state
from memcnn.engine.drift import SAMPLED, Drift, evaluations
from memcnn.engine.hooks import name_of
from memcnn.engine.replay import Replay
from memcnn.engine.retained import Stored, drop_later, end_pass, start_link
from memcnn.engine.rounding import relative_error
from memcnn.engine.torch_private import current_backward_pass, never_compiled


class Activation(Stored):
    """What autograd saves in place of a tensor (rule 2). It lives as long as the graph node that saved it."""

    __slots__ = ("dtype", "shape")

    @never_compiled
    def __init__(self, like: Tensor):
        self.tensor, self.version, self.shape, self.dtype = None, 0, like.shape, like.dtype


class Recomputation(Link):
    """A step: one evaluation of ``module`` on ``inputs``, which are dense. Subclasses define ``recompute``.

    Args:
        module: the branch, or the block.
        inputs: the tensors that ``module`` is evaluated on, and others that the step uses.
        targets: the values that the step consumes and rebuilds.
        keep_input: leave the targets' tensors stored.
        preserve_rng_state: give the recomputation the random numbers of the forward evaluation.
        check_inverse: the largest relative error that the rebuilt targets may have, which are stored for that.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[Tensor],
        targets: Sequence[Value],
        *,
        keep_input: bool = False,
        preserve_rng_state: bool = True,
        check_inverse: float | None = None,
    ):
        super().__init__(targets, keep=keep_input)
        if not keep_input and inputs and inputs[0].dtype in (torch.bfloat16, torch.float16):
            warnings.warn(
                f"rebuilding a {inputs[0].dtype} stream rounds as much again as computing in it, so that "
                "gradients drift by percents, growing with depth: give the blocks float32 (x.float()) and "
                "run their branches under torch.autocast, or use keep_input=True",
                stacklevel=2,
            )
        self.module, self.inputs = module, inputs
        self.holds = keep_input
        """Whether activations stay until the evaluation ends, for a module that differentiates itself."""
        self.check_inverse = check_inverse
        self.expected = [v.tensor for v in targets] if check_inverse is not None and not keep_input else []
        self.activations: list[weakref.ref[Activation]] = []
        self.nested: list[weakref.ref[Value]] = []
        self.requires_grad = [t.requires_grad for t in inputs]
        self.strides = [t.stride() for t in inputs]
        self.replay = Replay(module, inputs, preserve_rng_state)
        number = evaluations[module] = evaluations.get(module, 0) + 1
        self.drift = Drift(module) if number in SAMPLED else None

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def evaluate(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``, the forward evaluation. Autograd saves activations in it (rule 2)."""
        inputs = self.inputs
        versions = [t._version for t in inputs]
        recording, noted = thread_state.recording, thread_state.noted_sources
        thread_state.recording, thread_state.noted_sources = None, self.nested
        try:
            with self.replay.watch(), saved_tensors_hooks(self._pack, self._unpack):
                result = function(*args, **kwargs)
        finally:
            thread_state.recording, thread_state.noted_sources = recording, noted
            if self.holds:
                for reference in self.activations:
                    if (activation := reference()) is not None:
                        activation.tensor = None
        self.replay.evaluated()
        if versions != [t._version for t in inputs]:
            hooks = self.replay.hooks
            fix = (
                f"let the forward hook {name_of(hooks.in_place[0])}, which may be the cause, return a new tensor"
                if hooks is not None and hooks.in_place
                else "make its first operation an out-of-place one"
            )
            raise RuntimeError(f"{self.name} modifies its input in place, so that the block cannot be inverted: {fix}")
        self.inputs = ()
        return result

    def complete(self, sources: Sequence[Value]) -> None:
        """Forget the targets (rule 3) and the ends of chains within the evaluation (rule 6)."""
        super().complete(sources)
        if self.nested:  # one that was modified in place since is kept, and an error when it is read
            self._take(
                [
                    reference
                    for reference in self.nested
                    if (value := reference()) is not None
                    and value.tensor is not None
                    and value.tensor._version == value.version
                ]
            )
        if thread_state.noted_sources is not None:
            thread_state.noted_sources += map(weakref.ref, sources)

    def rebuild(self, keep_graph: bool) -> None:
        """Restore the activations and the targets (rule 4)."""
        if keep_graph:
            start_link()
        second = SecondEvaluation(self, keep_graph)
        tensors = self.recompute(second)
        if self.expected:
            self._check_inverse(tensors)
        self._give(self.targets, tensors, keep_graph)
        if not keep_graph:
            self.sources = ()
        second.finish()

    def recompute(self, second: "SecondEvaluation") -> Sequence[Tensor | None]:
        """Return the targets' tensors, computed from the sources; None for a target that nobody holds any more.

        The module is evaluated by ``second.run``, which fills the activations.
        """
        raise NotImplementedError

    def as_recorded(self, index: int, tensor: Tensor) -> Tensor:
        """Return an input as the forward evaluation saw it, with its strides and ``requires_grad``.

        Kernels depend on strides. An expanded input is dense now: only elementwise operations can have seen it.
        """
        if tensor.stride() != self.strides[index] and 0 not in self.strides[index]:
            like = torch.empty_strided(tensor.shape, self.strides[index], dtype=tensor.dtype, device=tensor.device)
            tensor = like.copy_(tensor)
        return tensor.detach().requires_grad_(self.requires_grad[index])

    def diverged(self, then: str, now: str) -> RuntimeError:
        """Return the error for a second evaluation that differs from the first (rule 5)."""
        return RuntimeError(
            f"{self.name} computed something else in the recomputation than in the forward pass "
            f"({then} then, {now} now): its forward must depend on its input, parameters, buffers and "
            "torch's random numbers alone; if it initialises itself from its first batch, give it one "
            "before it is wrapped"
        )

    def _check_inverse(self, tensors: Sequence[Tensor | None]) -> None:
        for got, wanted in zip(tensors, self.expected, strict=False):
            if wanted is not None:
                refuse_capture(wanted.device, "check_inverse compares values", "leave it out there")
            error = 0.0 if wanted is None else relative_error(got, wanted)
            if not error <= self.check_inverse:
                raise RuntimeError(
                    f"{self.name} is not inverted: its input of shape {tuple(wanted.shape)} is rebuilt with a relative "
                    f"error of {error:.1e}, more than check_inverse={self.check_inverse:.1e}, and gradients would be "
                    "as wrong; mend its inverse, or use keep_input=True, which needs none"
                )

    @never_compiled
    def _pack(self, tensor: Tensor) -> Activation | tuple[Tensor, int] | Tensor:
        if tensor.requires_grad and tensor.is_leaf:
            for own in self.inputs:
                if tensor is own:
                    break
            else:  # a parameter
                return tensor, tensor._version
        elif (norm := self.replay.running_statistics.get(id(tensor))) is not None:
            self.replay.untracked[norm] = None
            return tensor
        activation = Activation(tensor)
        self.activations.append(weakref.ref(activation))
        if self.holds and self.sources is None:
            activation.store(tensor)
        if self.drift is not None:
            self.drift.note(tensor)
        return activation

    @never_compiled
    def _unpack(self, saved: Any) -> Tensor:
        if type(saved) is Activation:
            tensor = self._rebuilt(saved) if saved.tensor is None else saved.tensor
            if tensor._version != saved.version:
                raise RuntimeError(
                    f"{self.name} modifies in place a tensor of shape {tuple(saved.shape)} that is "
                    "needed for its gradient: use an out-of-place operation there, as ordinary autograd "
                    "also asks"
                )
            return tensor
        if type(saved) is tuple:
            tensor, version = saved
            if tensor._version != version:
                raise RuntimeError(
                    f"a parameter of shape {tuple(tensor.shape)} that {self.name} used was modified "
                    "between forward and backward: call backward before the parameters change"
                )
            return tensor
        return saved

    @torch.compiler.disable(reason="reversible blocks rebuild their activations outside of compiled code")
    def _rebuilt(self, activation: Activation) -> Tensor:
        if self.sources is None:
            raise RuntimeError(
                f"{self.name} differentiates within its own forward pass, of which a reversible block "
                "stores nothing: wrap the block with keep_input=True, or with disable=True"
            )
        try:
            rebuild(self)
            return activation.tensor
        finally:
            if current_backward_pass() == -1:  # no backward pass: somebody looks into the graph
                end_pass(-1)


class SecondEvaluation:
    """The second evaluation of a step (rule 4): gives each activation its tensor.

    Args:
        step: the step to evaluate again.
        keep_graph: drop the tensors again later, since the graph is retained.
    """

    def __init__(self, step: Recomputation, keep_graph: bool):
        self.step, self.keep_graph = step, keep_graph
        self.pass_number = current_backward_pass()
        """The backward pass that wants this; the module may start passes of its own."""
        self.inputs: Sequence[Tensor] = ()
        self.seen = 0
        self.nested_tensors: list[Tensor | None] = []
        self.is_wanted = False
        """Whether anything but the targets is still waiting for a tensor."""
        for activation in step.activations:
            if activation() is not None:
                self.is_wanted = True
                break
        else:
            self.is_wanted = any(
                value is not None and value.link is step for value in (reference() for reference in step.nested)
            )

    @property
    def is_complete(self) -> bool:
        """Whether nothing is wanted, or the module has saved all that it saved in the first evaluation."""
        return not self.is_wanted or self.seen >= len(self.step.activations)

    def run(self, inputs: Sequence[Tensor], function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``. ``inputs`` are the tensors that stand for the step's inputs."""
        if not self.is_wanted:
            with torch.no_grad():
                return function(*args, **kwargs)
        self.inputs = inputs
        sources: list[weakref.ref[Value]] = []
        noted = thread_state.noted_sources
        thread_state.noted_sources = sources
        try:
            with torch.enable_grad(), saved_tensors_hooks(self._collect, self._unpack):
                result = function(*args, **kwargs)
        finally:
            thread_state.noted_sources = noted
        self.nested_tensors += [
            None if value is None else value.tensor for value in (reference() for reference in sources)
        ]
        return result

    def finish(self) -> None:
        """Check that everything was given what it waits for, and give nested chains their ends (rule 6)."""
        step = self.step
        if not self.is_wanted:
            return
        if self.seen != len(step.activations):
            raise step.diverged(f"{len(step.activations)} saved tensors", f"{self.seen}")
        if len(self.nested_tensors) != len(step.nested):
            raise step.diverged(f"{len(step.nested)} tensors of nested blocks", f"{len(self.nested_tensors)}")
        if step.drift is not None:
            step.drift.compare()
        if step.nested:
            step._give(step.nested, self.nested_tensors, self.keep_graph)

    @never_compiled
    def _collect(self, tensor: Tensor) -> Tensor | None:
        """Give the next activation its tensor. Return what the module sees if it differentiates itself."""
        step = self.step
        held = tensor.detach() if step.holds else None
        if tensor.requires_grad and tensor.is_leaf:
            for own in self.inputs:
                if tensor is own:
                    break
            else:  # a parameter
                return tensor if step.holds else None
        elif id(tensor) in step.replay.running_statistics:
            return held
        self.seen += 1
        if step.drift is not None:
            step.drift.note_rebuilt(self.seen - 1, tensor)
        if self.seen > len(step.activations) or (activation := step.activations[self.seen - 1]()) is None:
            return held
        if tensor.shape != activation.shape or tensor.dtype != activation.dtype:
            raise step.diverged(
                f"{activation.dtype} of shape {tuple(activation.shape)} as saved tensor {self.seen}",
                f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            )
        # a tensor with a graph would keep the whole evaluation alive
        activation.tensor = tensor if tensor.grad_fn is None else tensor.detach()
        activation.version = tensor._version
        if self.keep_graph:
            drop_later(activation, self.pass_number)
        return held

    @never_compiled
    def _unpack(self, held: Tensor | None) -> Tensor:
        if held is None:
            raise RuntimeError(
                f"{self.step.name} differentiates within its own forward pass in the recomputation "
                "alone: wrap the block with keep_input=True"
            )
        return held
