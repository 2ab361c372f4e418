"""What a run would be, and would need, before anything of it is written."""

import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import nn

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.testing.prediction import predict_step_memory, step_flops
from memcnn.training import checkpoint
from memcnn.training.environment import device_info
from memcnn.training.execution import Execution
from memcnn.training.files import holder
from memcnn.training.recipe import Recipe
from memcnn.training.record import NUM_CLASSES, load_all, run_name
from memcnn.training.step import FUSED_DEVICES, TrainingStep

TIMED_STEPS, TIMED_SECONDS = 5, 10.0  # as many, unless that takes longer
LEAST_ITERATIONS = 100  # of a run whose time tells something
MIB = 2**20


def preview(
    model: str, dataset: str, *, recipe: Recipe, seed: int, runs: Path, device: torch.device, execution: Execution,
    disable: bool = False,
) -> str:
    """Lines on the run: where it would go on, parameters, peak memory, arithmetic and time. Writes nothing.

    Memory and arithmetic are predicted on fake tensors. Time is that of an equal run's record, with the same model,
    batch and device, if `runs` holds one; else a few steps on made-up images are timed.
    """  # fmt: skip
    folder = runs / run_name(model, dataset, recipe, seed)
    left, state = _state(folder, recipe)

    def make_model() -> nn.Module:
        return MODELS[model](NUM_CLASSES[dataset], disable=disable)

    def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.zeros(recipe.batch_size, 3, 32, 32)
        return images, torch.zeros(recipe.batch_size, dtype=torch.int64)

    sgd = partial(torch.optim.SGD, lr=0.1, momentum=recipe.momentum, fused=device.type in FUSED_DEVICES)
    autocast = torch.bfloat16 if execution.precision == "bf16" else None
    memory = predict_step_memory(make_model, make_batch, optimizer=sgd, autocast=autocast, device=device.type)
    flops = step_flops(make_model, make_batch, autocast=autocast)
    timed = _of_records(runs, model, recipe, device, execution, engine=not disable)
    seconds, source = timed or _measured(make_model(), NUM_CLASSES[dataset], recipe, device, execution)
    parameters = sum(parameter.numel() for parameter in make_model().parameters())
    mib, activation_mib = memory.peak_bytes / MIB, memory.activation_bytes / MIB
    lines = {
        "run": f"{folder}: {state}",
        "recipe": f"{recipe.name}, {recipe.iterations:,} iterations of {recipe.batch_size} images",
        "device": f"{device_info(device)['name']}, {execution}",
        "parameters": f"{parameters:,} ({memory.parameter_bytes / MIB:.1f} MiB)",
        "peak memory": f"{mib:.1f} MiB of tensors in a step, {activation_mib:.1f} MiB of them activations; predicted",
        "arithmetic": f"{flops / 1e9:,.1f} GFLOP a step, forward and backward",
        "time": f"{timedelta(seconds=round(seconds * left))} for {left:,} iterations of {1000 * seconds:,.1f} ms, as "
        f"{source}; evaluations apart",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _state(folder: Path, recipe: Recipe) -> tuple[int, str]:
    """How many iterations are left, and what would happen."""
    by = holder(folder)
    if by is not None and by.lives is not False:
        return recipe.iterations, f"busy, {by} is training in it"
    if not (folder / checkpoint.FILE_NAME).exists():
        return recipe.iterations, "would begin"
    try:
        done = checkpoint.read(folder / checkpoint.FILE_NAME)[1]["iteration"]
    except checkpoint.BadCheckpoint as error:
        return recipe.iterations, str(error)
    if done == recipe.iterations:
        return 0, "is complete"
    return recipe.iterations - done, f"would go on from iteration {done:,}"


def _of_records(
    runs: Path, model: str, recipe: Recipe, device: torch.device, execution: Execution, *, engine: bool
) -> tuple[float, str] | None:
    """Seconds a step in the longest run that was executed like this one, and which one that is."""
    wanted = (model, recipe.batch_size, device_info(device), str(execution), engine)
    alike = [
        (found.iterations, found.train_seconds / found.iterations, f"in {folder.name}")
        for folder, found in load_all(runs)[0]
        if found.iterations >= LEAST_ITERATIONS
        and wanted
        == (found.model, found.recipe.batch_size, found.device, found.software.get("execution"), found.engine)
    ]
    return max(alike)[1:] if alike else None


def _measured(
    model: nn.Module, num_classes: int, recipe: Recipe, device: torch.device, execution: Execution
) -> tuple[float, str]:
    """Seconds a step, the quickest of a few on made-up images, after one that warms up."""
    data = cifar.generate(num_classes, train=recipe.batch_size, test=1).to(device)
    plan = cifar.epoch_plan(0, 0, recipe.batch_size, pad=recipe.pad, flip=recipe.flip).to(device)
    model.to(device, memory_format=torch.channels_last).train()
    seconds: list[float] = []
    with execution.settings(device):
        step = TrainingStep(model, recipe, data, execution)
        while len(seconds) < 1 + TIMED_STEPS and sum(seconds) < TIMED_SECONDS or len(seconds) < 2:
            started = time.perf_counter()
            step(plan, recipe.learning_rate)
            step.totals.tolist()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), f"in {len(seconds) - 1} steps just timed"
