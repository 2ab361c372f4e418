"""The two graph nodes of a run that goes the direct way. direct.py says why there are two."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from memcnn.engine.chain import rebuild
from memcnn.engine.direct_run import DirectRun
from memcnn.engine.torch_private import current_backward_pass, wanted_by_pass


def record(run: DirectRun, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Evaluate the run on ``inputs``, x1 and x2. Return y1 and y2, with their place in the outer graph."""
    halves: list[Tensor] = []
    with saved_tensors_hooks(run.pack, run.unpack):
        token = RunStart.apply(run, halves, *inputs, *run.parameters)
    return RunEnd.apply(run, halves, token)


class RunStart(torch.autograd.Function):
    """The node whose inputs are x1, x2 and the parameters. Its output is an empty tensor, the token.

    It leaves y1 and y2 in the list ``halves``, which is empty before, for ``RunEnd``.
    """

    @staticmethod
    def forward(ctx: Any, run: DirectRun, halves: list[Tensor], x1: Tensor, x2: Tensor, *parameters: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x1, x2)
        halves += (x1, x2)
        run.evaluate(halves)
        return x1.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        run, wanted = ctx.run, wanted_by_pass(ctx.next_functions)
        if not torch.is_grad_enabled():  # gradients are enabled only under ``create_graph=True``
            return None, None, *rebuild(run, partial(run.differentiate, wanted))
        run.inputs = run.rebuilt_inputs()
        try:
            inputs = ctx.saved_tensors
        finally:
            run.inputs = ()
        return None, None, *run.differentiate_twice(wanted, inputs)


class RunEnd(torch.autograd.Function):
    """The node of y1 and y2, which it takes out of ``halves``. Its backward stores their gradients on the run."""

    @staticmethod
    def forward(ctx: Any, run: DirectRun, halves: list[Tensor], token: Tensor) -> tuple[Tensor, Tensor]:
        ctx.run = run
        y1, y2 = halves
        halves.clear()
        return y1, y2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor]:
        ctx.run.gradients[current_backward_pass()] = list(gradients)
        return None, None, gradients[0].new_empty(0)
