"""The direct way: a run of quiet additive blocks is recorded as two graph nodes, which save no activations.

``CoupledBranch`` lets autograd record each branch and puts an empty ``Activation`` in place of each tensor that it
saves. Python then packs, collects and unpacks every saved tensor, which takes longer than small layers themselves. The
direct way has nothing to pack.

Words used here, in direct_run.py (what a run computes) and in direct_nodes.py (its place in the graph):

* A branch is *quiet* if it consists of simple layers of PyTorch. survey.py has the conditions.
* A *run* is a sequence of up to ``LONGEST_RUN`` additive blocks. Its inputs are x1 and x2, its outputs y1 and y2. A
  *step* changes one half: y1 = x1 + F(x2), or y2 = x2 + G(y1).
* The *outer graph* is the graph that the caller differentiates, and the *outer pass* is that backward pass.

==========  ==========================================================================================================
forward     ``RunStart`` becomes a node of the outer graph, whose inputs are x1, x2 and the parameters of all branches.
            The branches are evaluated without a graph, layer by layer (``bare_layers``). ``RunEnd`` is the node of the
            outputs y1 and y2.
backward    ``RunEnd`` hands the gradients of y1 and y2 to the run. ``RunStart`` undoes the steps in reverse order: it
            evaluates h = G(y1) with a small graph of its own, rebuilds x2 = y2 - h, and differentiates that graph,
            which autograd frees on the way; then the same for F. It returns the gradients of x1, x2 and the parameters
            to the outer pass, so accumulation, hooks and distributed wrappers see what they expect.
==========  ==========================================================================================================

Why two nodes: autograd holds the incoming gradients of a node until its backward returns. A single node would hold
those of y1 and y2 for the whole run. ``RunEnd`` returns at once and stores them on ``DirectRun``, which drops them
after the first block. An empty tensor, the token, connects the nodes.

A run takes the direct way if all of this holds in the forward pass. Otherwise each step is a ``CoupledBranch``.
``_replay_if_direct`` checks the conditions, except where another function is named.

1. All branches are quiet and are different modules. Their parameters are leaves.
2. Each step is y = a + F(b) or y = a - F(b), without exact mode and keyword arguments (``AdditiveCoupling`` checks
   this). Then the gradient of a is that of y, and the gradient of F(b) is the same up to its sign.
3. The run is not inside a branch of another block (``run_directly``). Such a branch must save the same tensors in both
   of its evaluations, and the conditions here may hold in only one of them.
4. x1 and x2 are float32 or float64 tensors on a CPU or a CUDA device.
5. The wrapper has neither ``keep_input`` nor ``check_inverse``. The drift watch samples none of these evaluations
   (drift.py). PyTorch's anomaly mode is off, because it reports the operation that failed in the forward pass. There
   are no global hooks, and no modes that may change what layers compute.
6. x1 and x2 require gradients, and no parameter has a ``.grad`` or a hook for its gradient. In all other cases the way
   with hooks for saved tensors needs less memory:

   * If x1 or x2 requires no gradient, it frees the gradient of y1 before it differentiates the last layers of a branch.
   * If a parameter has a ``.grad``, it adds each new gradient at once. A run holds its gradients until it is done.
   * If a parameter has a hook, it calls the hook at once, for the same reason.

Whatever changes between forward and backward is restored or raises an error as in every other step, by
``QuietReplay``, once for the run. If something has changed, or a parameter has got hooks, the second evaluation uses
*stand-ins*: aliases of the parameters, registered in their place, with gradients of their own.

``create_graph=True`` also uses stand-ins. ``RunStart`` saves x1 and x2 by ``save_for_backward``. The pack hook keeps
only an index, and the unpack hook returns the rebuilt tensor, which autograd connects with the ``grad_fn`` of x1 or x2.
The run is then evaluated once more from x1 and x2, as a part of the outer graph, with its activations.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from memcnn.engine.chain import evaluation_lock, thread_state
from memcnn.engine.direct_nodes import record
from memcnn.engine.direct_run import DirectRun
from memcnn.engine.drift import SAMPLED, Evaluations, evaluations
from memcnn.engine.quiet import QuietReplay
from memcnn.engine.sums import AdditiveStep
from memcnn.engine.survey import ParameterStates, Snapshot, bare_layers, take_snapshot
from memcnn.engine.torch_private import GLOBAL_BACKWARD_HOOKS, hooks_see_gradients, is_observed

LONGEST_RUN = 8
"""Maximum number of blocks in a run; ``memcnn.models.sequence`` ends a run there.

The gradients of a run's parameters are returned together. If a run were the whole network,
``DistributedDataParallel`` could not send gradients while others are still computed."""

_STREAM_DTYPES = frozenset({torch.float32, torch.float64})


def run_directly(steps: Sequence[AdditiveStep], halves: list[Tensor], *, subtract: bool) -> bool:
    """Evaluate the steps the direct way if they can take it: replace x1 and x2 in ``halves`` by y1 and y2.

    Return True if they took it. Otherwise change nothing and return False.

    Args:
        steps: the steps, in order.
        halves: holds x1 and x2.
        subtract: whether the branches are subtracted instead of added.
    """
    recording = thread_state.recording
    is_in_a_branch = thread_state.noted_sources is not None
    if recording is None or is_in_a_branch or not steps:
        return False
    with evaluation_lock:
        if (replay := _replay_if_direct(steps, halves, recording.options)) is None:
            return False
        run = DirectRun(steps, [recording.value(x) for x in halves], replay, subtract)
        halves[:] = record(run, halves)
    run.complete([recording.value(y) for y in halves])
    return True


def _replay_if_direct(steps: Sequence[AdditiveStep], halves: Sequence[Tensor], options: dict) -> QuietReplay | None:
    """Check the conditions of the direct way. If all hold, count the evaluations of the branches.

    Return the ``QuietReplay`` of the branches, or None if a condition does not hold.
    """
    for x in halves:
        if type(x) is not Tensor or x.dtype not in _STREAM_DTYPES or not x.requires_grad or not (x.is_cpu or x.is_cuda):
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
    parameter = next(branches[0].parameters(), None)
    # as a rule all parameters have a gradient if the first one has: then no snapshot is needed
    if parameter is not None and parameter.is_leaf and parameter.grad is not None:
        return None
    if len({*branches}) < len(branches) or (snapshot := take_snapshot(branches)) is None:
        return None
    if snapshot.plan is None:
        snapshot.plan = Plan(branches)
    counters = snapshot.plan.evaluations
    if not SAMPLED.isdisjoint([counter.number + 1 for counter in counters]):
        return None
    for p in snapshot.parameters:
        if not p.is_leaf or p.grad is not None:
            return None
    if hooks_see_gradients(snapshot.parameters):
        return None
    for counter in counters:
        counter.number += 1
    return QuietReplay(branches, halves[:1], snapshot)


class Plan:
    """The layers, parameters and counters of a run's branches. Kept with their snapshot, for later training steps."""

    def __init__(self, branches: Sequence[nn.Module]):
        self.evaluations = [evaluations.setdefault(branch, Evaluations()) for branch in branches]
        self.first_layers = [bare_layers(branch, tracking=True) for branch in branches]
        """For each step, the layers of its branch as the first evaluation needs them."""
        self.second_layers = [bare_layers(branch, tracking=False) for branch in branches]
        """For each step, the layers of its branch as the second evaluation needs them."""
        self.require_gradients: list[bool] | None = None
        """``requires_grad`` of all parameters, when ``trained`` and ``positions`` were made. None before that."""
        self.trained: list[Tensor] = []
        """The parameters of all branches with ``requires_grad=True``, each once."""
        self.positions: list[list[int]] = []
        """For each step, where its branch's parameters stand in ``trained``."""

    def select_trained(self, snapshot: Snapshot, states: ParameterStates) -> None:
        """Set ``trained`` and ``positions``, unless ``requires_grad`` of all parameters is as in the last call.

        Args:
            snapshot: the snapshot of the branches.
            states: the states of ``snapshot.parameters``.
        """
        require_gradients = [requires_grad for requires_grad, _, _ in states]
        if require_gradients == self.require_gradients:
            return
        remaining = iter(require_gradients)
        of_steps = [[p for _, _, p in survey.parameters if next(remaining)] for survey in snapshot.surveys]
        # dictionaries drop what is repeated, and keep the order
        self.trained = [*{id(p): p for parameters in of_steps for p in parameters}.values()]
        position = {id(p): i for i, p in enumerate(self.trained)}
        self.positions = [[*{position[id(p)]: None for p in parameters}] for parameters in of_steps]
        self.require_gradients = require_gradients
