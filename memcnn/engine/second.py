"""The second evaluation of a step: it fills the activations that the first one left empty (rule 4 in recompute.py)."""

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from memcnn.engine.chain import Value, thread_state
from memcnn.engine.retained import drop_later
from memcnn.engine.torch_private import current_backward_pass, never_compiled
from memcnn.reuse import evaluation

if TYPE_CHECKING:
    from memcnn.engine.recompute import Recomputation


class SecondEvaluation:
    """Gives each activation of ``step`` its tensor.

    Args:
        step: the step to evaluate again.
        keep_graph: the graph is retained, so that the tensors are dropped again later (rule 8).
    """

    def __init__(self, step: "Recomputation", keep_graph: bool):
        self.step, self.keep_graph = step, keep_graph
        self.pass_number = current_backward_pass()
        """The backward pass that asked for this evaluation. The module may start passes of its own in the meantime."""
        self.inputs: Sequence[Tensor] = ()
        self.seen = 0
        """Number of tensors that this evaluation has saved so far, not counting those that are saved as they are."""
        self.nested_tensors: list[Tensor | None] = []
        """The tensors of the values in ``step.nested``, in the same order."""
        kept = step.kept_results
        self.remaining = iter([result.clone() for result in kept] if keep_graph else kept)
        """Results of the first evaluation. Under ``retain_graph`` a later pass needs them as well."""
        self.is_wanted = False
        """True if an activation, or the end of a nested chain, still waits for its tensor."""
        for activation in step.activations:  # a loop instead of any(), which would take longer
            if activation() is not None:
                self.is_wanted = True
                break
        else:
            self.is_wanted = any(
                value is not None and value.link is step for value in (reference() for reference in step.nested)
            )

    @property
    def is_complete(self) -> bool:
        """True if nothing waits for a tensor, or the module has saved as many as in the first evaluation."""
        return not self.is_wanted or self.seen >= len(self.step.activations)

    def run(self, inputs: Sequence[Tensor], function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Return ``function(*args, **kwargs)``, where ``inputs`` are the tensors that stand for the step's inputs."""
        self.inputs = inputs if self.is_wanted else ()
        sources: list[weakref.ref[Value]] = []
        noted, kept, remaining = thread_state.noted_sources, evaluation.kept, evaluation.remaining
        evaluation.kept, evaluation.remaining = None, self.remaining
        try:
            if not self.is_wanted:
                with torch.no_grad():
                    return function(*args, **kwargs)
            thread_state.noted_sources = sources
            with torch.enable_grad(), saved_tensors_hooks(self._collect, self._unpack):
                result = function(*args, **kwargs)
        finally:
            thread_state.noted_sources, evaluation.kept, evaluation.remaining = noted, kept, remaining
        self.nested_tensors += [
            None if value is None else value.tensor for value in (reference() for reference in sources)
        ]
        return result

    def finish(self) -> None:
        """Check that nothing waits any longer, and give nested chains their ends (rule 6)."""
        step = self.step
        if not self.is_wanted:
            return
        if self.seen != len(step.activations):
            raise step.divergence_error(f"{len(step.activations)} saved tensors", f"{self.seen}")
        if left_over := len([*self.remaining]):
            kept = len(step.kept_results)
            raise step.divergence_error(f"{kept} results to reuse", f"{kept - left_over}")
        if len(self.nested_tensors) != len(step.nested):
            raise step.divergence_error(f"{len(step.nested)} tensors of nested blocks", f"{len(self.nested_tensors)}")
        if step.drift is not None:
            step.drift.compare()
        if step.nested:
            step._give(step.nested, self.nested_tensors, self.keep_graph)
        # the module may keep a graph, such as that of a weight under spectral norm, whose hooks refer to this object
        self.inputs, self.nested_tensors = (), []

    @never_compiled
    def _collect(self, tensor: Tensor) -> Tensor | None:
        """Give the next activation its tensor. The counterpart of ``Recomputation._pack``, whose rules it repeats.

        With ``keep_input`` return the tensor to save, because the module may differentiate within its own forward;
        else None.
        """
        step = self.step
        held = tensor.detach() if step.keeps_saved_tensors else None
        has_graph = tensor.requires_grad
        if has_graph:
            if tensor.is_leaf:
                has_graph = False  # the step's inputs are leaves here
                for step_input in self.inputs:
                    if tensor is step_input:
                        break
                else:  # a leaf that is no input, such as a parameter, is saved as it is
                    return tensor if step.keeps_saved_tensors else None
        elif id(tensor) in step.replay.running_statistics:
            return held
        self.seen += 1
        if step.drift is not None:
            step.drift.note_rebuilt(self.seen - 1, tensor)
        if self.seen > len(step.activations) or (activation := step.activations[self.seen - 1]()) is None:
            return held
        if tensor.shape != activation.shape or tensor.dtype != activation.dtype:
            raise step.divergence_error(
                f"{activation.dtype} of shape {tuple(activation.shape)} as saved tensor {self.seen}",
                f"{tensor.dtype} of shape {tuple(tensor.shape)}",
            )
        # a tensor with a graph would keep the whole evaluation alive
        activation.tensor = tensor.detach() if has_graph else tensor
        activation.version = tensor._version
        if self.keep_graph:
            drop_later(activation, self.pass_number)
        return held

    @never_compiled
    def _unpack(self, held: Tensor | None) -> Tensor:
        if held is None:
            raise RuntimeError(
                f"{self.step.name} differentiates within its own forward pass in the recomputation, but did "
                "not in the forward pass: wrap the block with keep_input=True"
            )
        return held
