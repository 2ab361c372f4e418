"""The law of training: after any number of optimiser steps a module and its plain twin are still the same."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.limits import Limit
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.rounding import condition_numbers, named
from memcnn.testing.laws.subject import Subject
from memcnn.testing.laws.twin import worst

SHIFT = 0.1
"""Added to the inputs from step to step, so that no two steps are the same."""


def sgd(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-3)


def check_training(
    module: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    wrap: bool | None = None,
    steps: int = 3,
    optimiser: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = sgd,
    evaluate: bool = True,
) -> Report:
    """Check that training the module gives what training its plain twin gives.

    Compared are the outputs of every step, parameters, gradients, running statistics, the random numbers drawn, and the
    results of forward and inverse in eval mode afterwards. The limit is that of `memcnn.testing.laws.limits.Limit` for
    twice the number of blocks a step.

    Args:
        module: a module with ``forward`` and ``inverse``, but without an engine of its own: that has no plain twin.
        inputs: the arguments of ``forward``. They are trained as well, where they are dense.
        seed: seed of torch's generators.
        wrap: as for `check_gradients`.
        steps: the number of optimiser steps.
        optimiser: makes an optimiser for a list of tensors. Where it divides by the size of a gradient, as Adam does,
            its ``eps`` must be larger than gradients that are rounding alone.
        evaluate: whether to run forward and inverse in eval mode afterwards.
    """
    subject = Subject(module, inputs, seed, wrap)
    claim = f"after {steps} optimiser steps the module is its plain twin"
    if subject.plain() is None:
        return Report((Result("training", claim, skipped="a module with an engine of its own has no plain twin"),))

    def train(module: nn.Module, *inputs: Tensor) -> list[Tensor]:
        trained = [x for x in (*module.parameters(), *inputs) if x.requires_grad and x.is_leaf]
        optimizer = optimiser(trained) if trained else None  # without one, buffers still move
        results: list[Tensor] = []
        for step in range(steps):
            torch.manual_seed(seed + step)
            if optimizer is not None:
                optimizer.zero_grad()
            outputs = module(*(x + SHIFT * step if x.is_floating_point() else x for x in inputs))
            outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
            # a mean, since a sum soon trains weights whose inverse loses all digits
            loss = subject.loss(outputs) / sum(y.numel() for y in outputs)
            if loss.requires_grad:
                loss.backward()
            if optimizer is not None:
                optimizer.step()
            results += outputs
        if evaluate:
            module.eval()
            with torch.no_grad():
                outputs = subject.call(module, *inputs)
                results += [*outputs, *subject.call(inverse_of(module), *outputs)]
        return [*results, *(x.detach().clone() for x in trained)]

    try:
        wanted = subject.run(subject.twin(), train)
        got = subject.run(subject.trained(), train)
    except Exception as exception:
        return Report(
            (Result("training", claim, math.inf, 0.0, explanation=f"raised {type(exception).__name__}: {exception}"),)
        )
    if not wanted.is_finite:
        return Report((Result("training", claim, skipped="plain training gives values that are not finite here"),))
    name, error = worst(got.errors(wanted))
    limit = Limit(
        subject.dtype,
        2 * steps * subject.depth,
        conditions=condition_numbers(
            subject, lambda s: named(s.run(s.trained(), train)), lambda s: named(s.run(s.twin(), train))
        ),
    )
    return Report((limit.judge("training", claim, error, f"{name} differs from that of plain training"),))
