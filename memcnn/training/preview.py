"""A preview of a run: its settings, data and memory, before anything is written."""

import time
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch import nn

from memcnn import data as cifar
from memcnn.memory import predict_step_memory, step_flops
from memcnn.models.resnet import MODELS
from memcnn.training import checkpoint
from memcnn.training.environment import device_info
from memcnn.training.execution import Execution
from memcnn.training.files import holder
from memcnn.training.job import Job, Place
from memcnn.training.recipe import Recipe
from memcnn.training.record import load_all
from memcnn.training.step import FUSED_DEVICES, TrainingStep

TIMED_STEPS, TIMED_SECONDS = 5, 10.0  # time 5 steps, or fewer if they take more than 10 seconds
LEAST_ITERATIONS = 100  # a segment with fewer iterations does not give a representative time
MIB = 2**20


def preview(job: Job, execution: Execution, place: Place, device: torch.device) -> str:
    """Return a text with a line each for state, recipe, device, parameters, memory, arithmetic and time of a run.

    Memory and arithmetic are predicted on fake tensors. The time is that of a recorded run with the same model, batch,
    device and execution, if there is one; otherwise a few steps on generated images are timed. Nothing is written.

    Args:
        job: the run.
        execution: how steps would be executed on the device.
        place: the folders of data and runs.
        device: the device that would train.
    """
    folder, recipe = job.folder(place), job.recipe
    left, state = _state(folder, recipe)

    def make_model() -> nn.Module:
        return MODELS[job.model](cifar.NUM_CLASSES[job.dataset], disable=job.disable)

    def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.zeros(recipe.batch_size, 3, 32, 32)
        return images, torch.zeros(recipe.batch_size, dtype=torch.int64)

    sgd = partial(torch.optim.SGD, lr=0.1, momentum=recipe.momentum, fused=device.type in FUSED_DEVICES)
    autocast = torch.bfloat16 if execution.precision == "bf16" else None
    memory = predict_step_memory(make_model, make_batch, optimizer=sgd, autocast=autocast, device=device.type)
    flops = step_flops(make_model, make_batch, autocast=autocast)
    timed = step_seconds_of_records(job, execution, replace(place, shared_by=1), device)
    seconds, source = timed or _measured(make_model(), cifar.NUM_CLASSES[job.dataset], recipe, device, execution)
    parameters = sum(parameter.numel() for parameter in make_model().parameters())
    mib, activation_mib = memory.peak_bytes / MIB, memory.activation_bytes / MIB
    lines = {
        "run": f"{folder}: {state}",
        "recipe": f"{recipe.name}, {recipe.iterations:,} iterations of {recipe.batch_size} images",
        "device": f"{device_info(device)['name']}, {execution}",
        "parameters": f"{parameters:,} ({memory.parameter_bytes / MIB:.1f} MiB)",
        "peak memory": f"{mib:.1f} MiB of tensors in a step, {activation_mib:.1f} MiB of them activations; predicted",
        "arithmetic": f"{flops / 1e9:,.1f} GFLOP a step, forward and backward",
        "time": f"{timedelta(seconds=round(seconds * left))} for {left:,} iterations of {1000 * seconds:,.1f} ms each "
        f"({source}), without evaluations",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines.items())


def _state(folder: Path, recipe: Recipe) -> tuple[int, str]:
    """Return the number of iterations left, and a phrase that says where training would begin."""
    by = holder(folder)
    if by is not None and by.is_alive is not False:
        return recipe.iterations, f"busy, {by} is training in it"
    if not (folder / checkpoint.FILE_NAME).exists():
        return recipe.iterations, "would start from iteration 0"
    try:
        done = checkpoint.read(folder / checkpoint.FILE_NAME)[1].iteration
    except checkpoint.BadCheckpoint as error:
        return recipe.iterations, str(error)
    if done == recipe.iterations:
        return 0, "is complete"
    return recipe.iterations - done, f"would resume from iteration {done:,}"


def step_seconds_of_records(
    job: Job, execution: Execution, place: Place, device: torch.device
) -> tuple[float, str] | None:
    """Return the seconds of a step in the longest segment recorded for an equal job, and a phrase that names its run.

    Args:
        job: the model and its batch size.
        execution: how steps are executed.
        place: the folder of runs to look in, and how many runs share the device.
        device: the device that trains; a segment counts only if it was computed on an equal one.
    """
    wanted = (device_info(device), str(execution), place.shared_by)
    alike = [
        (segment.iterations, segment.train_seconds / segment.iterations, f"as in {folder.name}")
        for folder, found in load_all(place.runs)[0]
        if (found.model, found.recipe.batch_size, found.engine) == (job.model, job.recipe.batch_size, not job.disable)
        for segment in found.segments
        if segment.iterations >= LEAST_ITERATIONS and (segment.device, segment.execution, segment.shared_by) == wanted
    ]
    return max(alike)[1:] if alike else None


def _measured(
    model: nn.Module, num_classes: int, recipe: Recipe, device: torch.device, execution: Execution
) -> tuple[float, str]:
    """Return the least seconds of a few steps on generated images, after a warm-up, and a phrase with their number."""
    data = cifar.generate(num_classes, train=recipe.batch_size, test=1).to(device)
    plan = cifar.epoch_plan(0, 0, recipe.batch_size, pad=recipe.pad, flip=recipe.flip).to(device)
    model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # the stub lacks memory_format
    seconds: list[float] = []
    with execution.settings(device):
        step = TrainingStep(model, recipe, data, execution)
        while (len(seconds) < 1 + TIMED_STEPS and sum(seconds) < TIMED_SECONDS) or len(seconds) < 2:
            started = time.perf_counter()
            step(plan, recipe.learning_rate)
            step.totals.tolist()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return min(seconds[1:]), f"{len(seconds) - 1} steps timed just now"
