"""The law of memory: a chain of reversible blocks needs the same activation memory at any depth."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from memcnn.memory import TensorMeter
from memcnn.models.revop import InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.laws.guard import described
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.subject import Subject, as_tuple
from memcnn.testing.laws.twin import seeded, weighted_sum

SHARE = 0.01
"""Share of what plain backpropagation stores for a block that a further reversible block may hold."""
STATE_BYTES = 8192
"""Bytes that a further block may hold besides: one generator state for each direction (5,056 bytes)."""
ENGINE_MAPS = 10
"""Number of tensors like the output that a block with its own engine is assumed to store in plain backpropagation."""

DEPTHS = 4, 12
DEPTHS_OF_CHAINS = 1, 3
"""Numbers of copies of the module that are compared. The second pair is for modules of ``MANY_BLOCKS`` or more."""
MANY_BLOCKS = 16

MakeChain = Callable[[int], nn.Module]
"""Makes a chain of a number of blocks."""


def check_memory(
    module: nn.Module,
    *inputs: Tensor,
    seed: int = 0,
    wrap: bool | None = None,
    depths: tuple[int, int] | None = None,
    chain: MakeChain | None = None,
    passes: int = 1,
    allowance: int | None = None,
) -> Report:
    """Check that the peak memory of a training step stays the same as the chain gets deeper, parameter gradients apart.

    Counts the bytes of tensors exactly (`memcnn.memory.TensorMeter`), on any device. The limit is 1 % of what
    plain backpropagation stores for a further block, plus ``allowance``. A block that needs the allowance is measured
    again with a batch twice as large, which state does not depend on.

    Args:
        module: a module with ``forward`` and ``inverse``; the output must have the shape of the input.
        inputs: one tensor.
        seed: seed of torch's generators.
        wrap: as for `check_gradients`.
        depths: the two numbers of blocks that are compared. None for 4 and 12, or for 1 and 3 where the module itself
            has 16 blocks or more.
        chain: makes a chain of a number of blocks, for an engine with a container of its own; by default copies of the
            module in a `ReversibleSequential`, or with ``wrap=False`` in an ``nn.Sequential``.
        passes: the number of backward passes; the graph is retained until the last.
        allowance: bytes that a further block may hold besides; None for those of its buffers and of generator states.
    """
    subject = Subject(module, inputs, seed, wrap)
    depths = depths or (DEPTHS if subject.depth < MANY_BLOCKS or chain else DEPTHS_OF_CHAINS)
    claim = f"peak bytes at {depths[0]} and {depths[1]} blocks are the same"
    if len(inputs) != 1:
        return Report((Result("memory", claim, skipped="wants a module of one input to chain"),))
    with torch.no_grad():
        outputs = subject.evaluated(subject.fresh(), inputs)
    if len(outputs) != 1 or outputs[0].shape != inputs[0].shape:
        return Report(
            (
                Result(
                    "memory",
                    claim,
                    skipped="the output does not have the shape of the input, so blocks do not form a chain",
                ),
            )
        )
    if reason := _why_inputs_are_kept(subject):
        return Report((Result("memory", claim, skipped=reason),))
    make, x = chain or _copies(subject), subject.inputs[0]
    measure = partial(bytes_per_block, make, depths=depths, seed=seed, passes=passes)
    try:
        growth = measure(x)
        stored = _stored_bytes(subject, outputs[0], passes)
    except Exception as error:
        return Report((Result("memory", claim, math.inf, 0.0, explanation=f"raised {described(error)}"),))
    if allowance is None:
        allowance = _buffer_bytes(module) + STATE_BYTES
    share, limit = SHARE * stored, SHARE * stored + allowance
    source = (
        f"bytes a further block adds: {SHARE:.0%} of the {stored:,.0f} that plain backpropagation stores for it"
        + ", its buffers and generator states" * (allowance > 0)
    )
    fault = f"each further block holds {growth:,.0f} bytes of activations until its backward pass"
    result = Result("memory", claim, max(0.0, growth), limit, source, fault if not growth <= limit else "")
    return Report((result, _check_batch(x, measure, growth, share)) if share < growth <= limit else (result,))


def _why_inputs_are_kept(subject: Subject) -> str:
    """Explain why the module needs its wrappers' ``keep_input=True``; "" if it has none or would train without."""
    module = subject.fresh()
    keeping = [part for part in module.modules() if isinstance(part, InvertibleModuleWrapper) and part.keep_input]
    for part in keeping:
        part.keep_input = False
    try:
        if keeping:
            subject.run(module)
    except Exception as error:
        return f"keep_input=True stores each block's input, and without it the training step raised {described(error)}"
    return ""


def _check_batch(x: Tensor, measure: Callable[[Tensor], float], growth: float, share: float) -> Result:
    """Distinguish state, which does not depend on the batch, from activations that are as small."""
    claim = "what a further block holds does not grow with the batch"
    try:
        more = measure(torch.cat((x, x))) - growth
    except Exception as error:
        return Result("memory", claim, skipped=f"a batch twice as large raised {described(error)}")
    return Result(
        "memory",
        claim,
        max(0.0, more),
        share,
        "bytes that a further block adds to a batch twice as large",
        "" if more <= share else f"each further block holds {more:,.0f} bytes more of a batch twice as large",
    )


def bytes_per_block(make: MakeChain, x: Tensor, *, depths: tuple[int, int], seed: int = 0, passes: int = 1) -> float:
    """Return the bytes that a further block adds to the peak of a training step, gradients of parameters apart."""
    few, many = (step_bytes(make(depth), x, seed=seed, passes=passes) for depth in depths)
    return (many - few) / (depths[1] - depths[0])


def step_bytes(chain: nn.Module, x: Tensor, *, seed: int = 0, passes: int = 1) -> int:
    """Return the peak bytes of a training step beyond the input, the parameters and their gradients."""
    leaf = x.detach().clone().requires_grad_()
    with torch.no_grad(), seeded([x], seed):
        chain(leaf.clone())  # a layer that initialises itself has done so
    for value in (leaf, *chain.parameters()):
        value.grad = torch.zeros_like(value)
    with TensorMeter() as meter, seeded([x], seed):
        loss = weighted_sum(*as_tuple(chain(leaf)), seed=seed)
        for i in range(passes):
            loss.backward(retain_graph=i + 1 < passes)
    return meter.peak_bytes


def _copies(subject: Subject) -> MakeChain:
    container = nn.Sequential if subject.wrap is False else ReversibleSequential
    return lambda depth: container(*(subject.fresh() for _ in range(depth)))


def _stored_bytes(subject: Subject, output: Tensor, passes: int) -> float:
    """Return what plain backpropagation stores for a further block."""
    if subject.plain() is None:
        return ENGINE_MAPS * output.numel() * output.element_size()
    return bytes_per_block(
        lambda depth: nn.Sequential(*(subject.twin() for _ in range(depth))),
        subject.inputs[0],
        depths=(1, 3),
        seed=subject.seed,
        passes=passes,
    )


def _buffer_bytes(module: nn.Module) -> int:
    return 2 * sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
