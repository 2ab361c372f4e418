"""The law of memory: a chain of reversible blocks needs the same activation memory at any depth."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from memcnn.models.revop import ReversibleSequential
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import Subject, as_tuple
from memcnn.testing.memory import TensorMeter

SHARE = 0.01
"""Of what plain backpropagation stores for a block, the part that a further reversible block may hold."""
STATE_BYTES = 8192
"""What a further block may hold beside: one generator state for each direction (5,056 bytes)."""


def check_memory(module: nn.Module, *inputs: Tensor, seed: int = 0, wrap: bool | None = None,
                 depths: tuple[int, int] = (4, 12), chain: Callable[[int], nn.Module] | None = None) -> Report:
    """Whether the peak bytes of a training step stay the same as the chain gets deeper, parameter gradients apart.

    Counts tensors exactly (`memcnn.testing.memory.TensorMeter`), on any device. A further block may hold a generator's
    state; what it holds is measured again with a batch twice as large, of which state knows nothing.

    Args:
        module: with ``forward`` and ``inverse``; the output must have the shape of the input.
        inputs: one tensor.
        seed: of torch's generators.
        wrap: as for `check_gradients`.
        depths: the two numbers of blocks that are compared.
        chain: makes a chain of a number of blocks, for an engine with a container of its own; by default copies of the
            module in a `ReversibleSequential`, or with ``wrap=False`` in an ``nn.Sequential``.
    """
    subject = Subject(module, inputs, seed, wrap)
    claim = f"peak bytes at {depths[0]} and {depths[1]} blocks are the same"
    if len(inputs) != 1:
        return Report((Result("memory", claim, skipped="wants a module of one input to chain"),))
    with torch.no_grad():
        outputs = subject.evaluated(subject.fresh(), inputs)
    if len(outputs) != 1 or outputs[0].shape != inputs[0].shape:
        return Report((Result("memory", claim, skipped="the output has not the shape of the input, so that blocks do "
                                                       "not form a chain"),))
    try:
        growth = _growth(subject, depths, chain)
        stored = _stored_bytes(subject, outputs[0])
    except Exception as error:
        return Report((Result("memory", claim, math.inf, 0.0, explanation=f"raised {type(error).__name__}: {error}"),))
    share, limit = SHARE * stored, SHARE * stored + _buffer_bytes(module) + STATE_BYTES
    source = (f"bytes a further block adds: {SHARE:.0%} of the {stored:,.0f} that plain backpropagation stores for it, "
              "its buffers and generator states")
    told = f"each further block holds {growth:,.0f} bytes of activations until its backward pass"
    result = Result("memory", claim, max(0.0, growth), limit, source, told if not growth <= limit else "")
    if not share < growth <= limit:
        return Report((result,))
    return Report((result, _check_batch(subject, depths, chain, growth, share)))


def _check_batch(subject: Subject, depths: tuple[int, int], chain: Callable | None, growth: float,
                 share: float) -> Result:
    """Tells state, which does not depend on the batch, from activations small enough to pass for it."""
    claim = "what a further block holds does not grow with the batch"
    (x,) = subject.inputs
    try:
        more = _growth(replace(subject, inputs=(torch.cat((x, x)),)), depths, chain) - growth
    except Exception as error:
        return Result("memory", claim, skipped=f"a batch twice as large raised {type(error).__name__}: {error}")
    return Result("memory", claim, max(0.0, more), share, "bytes that a further block adds to a batch twice as large",
                  "" if more <= share else f"each further block holds {more:,.0f} bytes more of a batch twice as large")


def _growth(subject: Subject, depths: tuple[int, int], chain: Callable[[int], nn.Module] | None) -> float:
    """Bytes that a further block adds to the peak."""
    few, many = (_peak_bytes(subject, (chain or _chain(subject))(depth)) for depth in depths)
    return (many - few) / (depths[1] - depths[0])


def _chain(subject: Subject) -> Callable[[int], nn.Module]:
    container = nn.Sequential if subject.wrap is False else ReversibleSequential
    return lambda depth: container(*(subject.fresh() for _ in range(depth)))


def _peak_bytes(subject: Subject, chain: nn.Module) -> int:
    """Beyond input, parameters and their gradients."""
    (x,) = subject.leaves()
    with torch.no_grad(), subject.seeded():
        chain(x.clone())  # a layer that initialises itself has done so
    for value in (x, *chain.parameters()):
        value.grad = torch.zeros_like(value)
    with TensorMeter() as meter, subject.seeded():
        subject.loss(as_tuple(chain(x))).backward()
    return meter.peak_bytes


def _stored_bytes(subject: Subject, output: Tensor) -> float:
    """What a further block stores in plain backpropagation; under an engine of its own, ten times its output."""
    twin = subject.plain()
    if twin is None:
        return 10 * output.numel() * output.element_size()
    few, many = (_peak_bytes(subject, nn.Sequential(*(copy.deepcopy(twin) for _ in range(depth)))) for depth in (1, 3))
    return (many - few) / 2


def _buffer_bytes(module: nn.Module) -> int:
    return 2 * sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
