"""The training steps that ``bench.speed`` times: each network in each execution, one run or a group of runs."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.recipe import PUBLISHED, override
from memcnn.training.step import TrainingStep

LEARNING_RATE = 1e-4  # so small that the weights hardly change during the measurement
ON_GPU = (
    Execution(precision="tf32"),
    Execution(precision="bf16"),
    Execution(graph=True),
    Execution(precision="tf32", graph=True),
    Execution(precision="bf16", graph=True),
)
COMPILED = (Execution(compile=True),)
CANDIDATES = ({"fused_norms": True}, {"combine_kernels": True}, {"fused_norms": True, "combine_kernels": True})
"""Options that may make the fastest execution faster, and that no GPU has timed yet."""


@dataclass(frozen=True)
class Way:
    """An execution of training steps, for one run or for a group of runs.

    Attributes:
        execution: the execution of a step.
        group: number of training runs whose steps are interleaved in one process.
    """

    execution: Execution
    group: int = 1


PLAIN = Way(Execution())


def fast_ways(device: torch.device, *, group: int = 1, tries: bool = False) -> list[Way]:
    """Return the fastest execution of a device, and what to compare it with.

    That is the same without our kernels and the fastest deterministic one, or with ``tries`` the executions that may
    turn out to be faster. Each execution takes a minute to compile, so the former are then left out.

    Args:
        device: where the steps run.
        group: if above 1, add the fastest execution and the tries as groups if they capture their steps.
        tries: compare with the executions that may turn out to be faster.
    """
    fastest = Execution.fastest(device)
    known = [replace(fastest, narrow_convolutions=False), Execution.fastest(device, deterministic=True)]
    candidates = [replace(fastest, **options) for options in CANDIDATES] if tries else []
    together = dict.fromkeys(execution.on(device)[0] for execution in (fastest, *candidates))
    executions = dict.fromkeys(execution.on(device)[0] for execution in (fastest, *(candidates or known)))
    return [*map(Way, executions), *_groups([*together], group)]


def all_ways(device: torch.device, *, group: int = 1, compiled: bool = False) -> list[Way]:
    """Return the plain float32 step, the other executions of the device, and, if ``compiled``, ``torch.compile``.

    With ``group`` above 1, every execution that captures its steps is added as a group.
    """
    executions = [PLAIN.execution, *(ON_GPU if device.type == "cuda" else ()), *(COMPILED if compiled else ())]
    return [*map(Way, executions), *_groups(executions, group)]


def _groups(executions: list[Execution], group: int) -> list[Way]:
    return [Way(execution, group) for execution in executions if group > 1 and execution.graph]


def step_of(network: str, way: Way, *, batch: int, device: torch.device) -> Callable[[int], None]:
    """Return a function that runs a given number of training steps on generated images.

    In a group each run has its own weights and its own stream, so that kernels of several runs overlap. The function
    interleaves their steps.

    Args:
        network: a name in ``MODELS``.
        way: the execution, and the size of the group.
        batch: images a step.
        device: where the steps run.
    """
    data = cifar.generate(10, train=4 * batch, test=1).to(device)
    plan = cifar.epoch_plan(0, 0, 4 * batch, pad=PUBLISHED.pad, flip=True).to(device)
    part = plan.part(0, batch)
    recipe = override(PUBLISHED, batch_size=batch)
    members = []
    for _ in range(way.group):
        model = MODELS[network]().to(device, memory_format=torch.channels_last)
        step = TrainingStep(model, recipe, data, way.execution)
        members.append((step, _new_stream(device) if way.group > 1 else None))

    def run(count: int) -> None:
        with way.execution.settings(device):
            for _ in range(count):
                for step, stream in members:
                    with nullcontext() if stream is None else torch.cuda.stream(stream):
                        step(part, LEARNING_RATE)

    return run


def _new_stream(device: torch.device) -> "torch.cuda.Stream":
    """Return a stream that starts after all work queued on the current one."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
    return stream


def cpu_variants(network: str, *, batch: int) -> dict[str, Callable[[int], None]]:
    """Return the training step of a CPU, and variants that differ from it in one choice each.

    Returns:
        Name of the variant -> function that runs a given number of steps.
    """

    def step(*, channels_last: bool = True, fused: bool = True, bf16: bool = False, compiled: bool = False) -> Callable:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = MODELS[network]().to(memory_format=layout)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=2e-4, fused=fused)
        images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=layout)
        labels = torch.arange(batch) % 10
        forward = torch.compile(model) if compiled else model

        def run(count: int) -> None:
            for _ in range(count):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = F.cross_entropy(forward(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return run

    return {
        "as it is": step(),
        "contiguous (NCHW)": step(channels_last=False),
        "SGD, not fused": step(fused=False),
        "bfloat16": step(bf16=True),
        "torch.compile": step(compiled=True),
    }
