"""The idea: run forward as usual, forget the activations, and rebuild them when backward asks for them.

Rules

1. The forward pass of a branch is the ordinary one. Autograd records it, so that hooks, gradient accumulators and
   distributed wrappers see the ordinary graph. Up to eight consecutive additive blocks of ``torch.nn`` layers are
   recorded in a shorter way, without hooks for the tensors that their branches save (direct.py).
2. The tensors that the graph would save are dropped. ``torch.autograd.graph.saved_tensors_hooks`` saves an empty
   ``Activation`` in place of each. Leaf tensors with ``requires_grad=True``, such as parameters, and running statistics
   are saved as they are, because they exist anyway.
3. A *step* is one evaluation of a branch and what the block does with its output: x1 is replaced by y1 = x1 + F(x2).
   A ``Value`` stands for one tensor of the chain of blocks. After the step, the value of x1 drops its tensor and
   refers to the step, which can compute x1 again from its *sources*, the values of y1 and x2. A chain of any length
   therefore stores only its end.
4. When backward first asks a step for an activation, the step evaluates its branch once more, on the branch's own
   input. This second evaluation saves the same tensors in the same order, so that each goes to its activation. The
   step then inverts its sum (or affine map) with the branch's output: x1 = y1 - F(x2). The calls are, in order,
   ``Recomputation._unpack`` and ``_rebuilt``, ``rebuild`` in chain.py (a loop over the steps that are needed first),
   ``Recomputation.rebuild``, ``CoupledBranch.recompute`` in couple.py, and ``SecondEvaluation.run`` in second.py.
5. The second evaluation sees what the first saw: strides, random numbers, autocast, training or evaluation mode,
   buffers, attributes and hooks (replay.py; quiet.py for most branches). If the tensors that it saves differ from those
   of the first in number, shape or dtype, an error is raised. In a few evaluations their values are compared as well
   (drift.py). docs/limits.md lists what remains unnoticed.
6. Blocks may be nested. A chain inside a branch does not store its output. The second evaluation of the branch computes
   it again.
7. The engine never writes to inputs, outputs or parameters. Buffers that the first evaluation updated are set back for
   the second, and then restored. A value refers to its step, and a step to its sources. There are no cycles, so that
   reference counting frees everything.
8. Under ``retain_graph=True`` rebuilt tensors are kept until 8 further steps were rebuilt or the pass ends
   (``KEPT_LINKS`` in retained.py), and rebuilt again if needed.

Example: an additive block, y1 = x1 + F(x2) and y2 = x2 + G(y1)

==========  ==========================================================================================================
forward     F(x2) is evaluated. Autograd would save the tensors s1, ..., sn within F; the activations a1, ..., an take
            their place (rule 2). The value of x1 now holds the step, whose sources are the values of y1 and x2. The
            tensor x1 is freed, unless the caller holds it (rule 3).
            The step y2 = x2 + G(y1) then replaces x2 in the same way. The values of y1 and y2 are the chain's end.
backward    Autograd differentiates G first, and asks for an activation in G. The step of G evaluates h = G(y1), fills
            its activations and rebuilds x2 = y2 - h (rule 4). Autograd uses the activations and frees them.
            Then autograd differentiates F and asks for a1. The step of F evaluates h = F(x2), fills a1, ..., an, and
            rebuilds x1 = y1 - h. The block before this one needs x1 and x2 next: they are its outputs.
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
from memcnn.engine.chain import Link, Value, rebuild, restrided, thread_state
from memcnn.engine.drift import SAMPLED, Evaluations, drift_of, evaluations
from memcnn.engine.hooks import name_of
from memcnn.engine.identity import modified_input_error
from memcnn.engine.quiet import replay_of
from memcnn.engine.retained import Stored, end_pass, start_link
from memcnn.engine.rounding import relative_error
from memcnn.engine.second import SecondEvaluation
from memcnn.engine.torch_private import current_backward_pass, never_compiled, never_compiled_within
from memcnn.reuse import evaluation


class Activation(Stored):
    """A placeholder for one tensor that autograd saves within a branch.

    It is empty until the second evaluation fills it (rule 2). It lives as long as the graph node that saved it.
    """

    __slots__ = ("dtype", "shape")

    @never_compiled
    def __init__(self, like: Tensor):
        self.tensor, self.version, self.shape, self.dtype = None, 0, like.shape, like.dtype


class Recomputation(Link):
    """A step (rule 3): one evaluation of ``module``, and the link that rebuilds what it was computed from.

    ``CoupledBranch`` and ``OpaqueModule`` are its subclasses. The methods, in the order in which they run:

    =============  ===================================================================================================
    ``evaluate``   Forward: runs the first evaluation, in which autograd saves empty activations.
    ``complete``   Forward: lets the targets drop their tensors and refer to this step.
    ``_rebuilt``   Backward: returns the tensor of one activation that autograd asks for.
    ``rebuild``    Backward: restores all activations and targets of this step. Its sources have their tensors by then.
    ``recompute``  The part of ``rebuild`` that a subclass defines: runs the second evaluation and undoes the step.
    =============  ===================================================================================================

    Args:
        module: the branch, or the block.
        inputs: the tensors that the step uses, such as x1 and x2; ``module`` may be evaluated on some of them only.
            Those that it is evaluated on are non-overlapping and dense.
        targets: the values whose tensors the step drops, and later rebuilds.
        keep_input: leave the targets' tensors stored.
        preserve_rng_state: give the recomputation the random numbers of the forward evaluation.
        check_inverse: the largest relative error that rebuilt targets may have. The targets are stored to compare them.
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
                f"rebuilding a {inputs[0].dtype} stream adds as much rounding as computing it, so that gradients are "
                "wrong by several percent, and by more in deeper chains: give the blocks float32 (x.float()) and run "
                "their branches under torch.autocast, or use keep_input=True",
                stacklevel=2,
            )
        self.module, self.inputs = module, inputs
        self.keeps_saved_tensors = keep_input
        """True with ``keep_input``. Saved tensors then stay stored until forward returns, because it may call
        ``autograd.grad``."""
        self.check_inverse = check_inverse
        self.expected = [v.tensor for v in targets] if check_inverse is not None and not keep_input else []
        self.activations: list[weakref.ref[Activation]] = []
        self.nested: list[weakref.ref[Value]] = []
        self.kept_results: list[Tensor] = []
        """Results of the first evaluation that the second one reuses (memcnn/reuse.py)."""
        self.requires_grad = [t.requires_grad for t in inputs]
        self.strides = [t.stride() for t in inputs]
        self.replay = replay_of(module, inputs, preserve_rng_state)
        counter = evaluations.setdefault(module, Evaluations())
        counter.number += 1
        self.drift = drift_of(module) if counter.number in SAMPLED else None

    @property
    def name(self) -> str:
        return type(self.module).__name__

    def evaluate(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``, the forward evaluation, in which autograd saves empty activations."""
        inputs = self.inputs
        versions = [t._version for t in inputs]
        recording, noted = thread_state.recording, thread_state.noted_sources
        thread_state.recording, thread_state.noted_sources = None, self.nested
        kept, remaining = evaluation.kept, evaluation.remaining
        evaluation.kept, evaluation.remaining = self.kept_results if self.replay.may_reuse else None, None
        try:
            with saved_tensors_hooks(self._pack, self._unpack):
                if self.replay.watch is None:
                    result = function(*args, **kwargs)
                else:
                    with self.replay.watch():
                        result = function(*args, **kwargs)
        finally:
            thread_state.recording, thread_state.noted_sources = recording, noted
            evaluation.kept, evaluation.remaining = kept, remaining
            if self.keeps_saved_tensors:
                for reference in self.activations:
                    if (activation := reference()) is not None:
                        activation.tensor = None
        if self.replay.watch is not None:
            self.replay.evaluated()
        if versions != [t._version for t in inputs]:
            hooks = self.replay.hooks
            if hooks is not None and hooks.in_place:
                cause = name_of(hooks.in_place[0])
                fix = f"let the forward hook {cause}, which may be the cause, return a new tensor"
                raise modified_input_error(self.name, fix)
            raise modified_input_error(self.name)
        self.inputs = ()
        return result

    def complete(self, sources: Sequence[Value]) -> None:
        """Let the targets (rule 3) and the ends of nested chains (rule 6) drop their tensors and refer to this step.

        ``nested`` has the sources of all steps within the evaluation. Those that still store a tensor are the ends of
        chains. If this step is itself within the branch of another one, note its sources there in the same way.
        """
        super().complete(sources)
        if self.nested:
            unmodified_ends = [
                reference
                for reference in self.nested
                if (value := reference()) is not None
                and value.tensor is not None
                # a tensor that was modified in place stays: ``Value.read`` sees its new version, and raises
                and value.tensor._version == value.version
            ]
            self._take(unmodified_ends)
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

    def recompute(self, second: SecondEvaluation) -> Sequence[Tensor | None]:
        """Return the targets' tensors, computed from the sources; None for a target that nobody holds any more.

        The module is evaluated by ``second.run``, which fills the activations.
        """
        raise NotImplementedError

    def as_recorded(self, index: int, tensor: Tensor) -> Tensor:
        """Return an input as the forward evaluation saw it, with its strides and ``requires_grad``."""
        if tensor.stride() != self.strides[index]:
            tensor = restrided(tensor, self.strides[index])
        return tensor.detach().requires_grad_(self.requires_grad[index])

    def divergence_error(self, then: str, now: str) -> RuntimeError:
        """Return the error for a second evaluation that differs from the first (rule 5)."""
        return RuntimeError(
            f"{self.name} computed something else in the recomputation than in the forward pass "
            f"({then} then, {now} now): its forward must depend on its input, parameters, buffers and "
            "torch's random numbers alone; if it initialises itself from its first batch, give it one "
            "before it is wrapped. The default dtype, modes of torch.overrides and caches such as "
            "parametrize.cached() must be the same in backward"
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
                    "wrong by about as much: correct its inverse, or use keep_input=True, which needs none"
                )

    @never_compiled
    def _pack(self, tensor: Tensor) -> Activation | tuple[Tensor, int] | Tensor:
        """Return what autograd saves in place of a tensor of the first evaluation.

        Inputs of the step are dropped like all other tensors, although they may be leaves with ``requires_grad=True``.
        """
        if tensor.requires_grad:
            if tensor.is_leaf:
                for step_input in self.inputs:
                    if tensor is step_input:
                        break
                else:  # no input, but for example a parameter
                    return tensor, tensor._version
        elif (batch_norm := self.replay.running_statistics.get(id(tensor))) is not None:
            self.replay.untracked[batch_norm] = None
            return tensor
        activation = Activation(tensor)
        self.activations.append(weakref.ref(activation))
        if self.keeps_saved_tensors and self.sources is None:
            activation.store(tensor)
        if self.drift is not None:
            self.drift.note(tensor)
        return activation

    @never_compiled
    def _unpack(self, saved: Any) -> Tensor:
        """Return the tensor that autograd needs in backward, in place of what ``_pack`` has returned for it."""
        if type(saved) is Activation:
            tensor = self._rebuilt(saved) if saved.tensor is None else saved.tensor
            if tensor._version != saved.version:
                raise RuntimeError(
                    f"{self.name} modifies in place a tensor of shape {tuple(saved.shape)} that is "
                    "needed for its gradient, which ordinary autograd refuses as well: use an out-of-place "
                    "operation there"
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

    @never_compiled_within
    def _rebuilt(self, activation: Activation) -> Tensor:
        """Return the tensor of an empty activation: have this step rebuilt, after the steps that it needs."""
        if self.sources is None:
            raise RuntimeError(
                f"{self.name} differentiates within its own forward pass, but a reversible block stores "
                "none of its activations: wrap the block with keep_input=True, or with disable=True"
            )
        try:
            rebuild(self)
            return activation.tensor
        finally:
            # outside of backward, as for ``grad_fn._saved_self``, no pass ends that would drop the rebuilt tensors
            if current_backward_pass() == -1:
                end_pass(-1)
