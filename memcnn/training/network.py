"""Build the network of a run from its seed, and measure the memory of a step for its record."""

import copy
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from memcnn import data as cifar
from memcnn.memory import measure_step_memory
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.job import Job


def new_network(job: Job, num_classes: int, device: torch.device) -> nn.Module:
    """Return a job's network with the initial weights of its seed, on the device, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(job.seed)
        model = MODELS[job.model](num_classes, disable=job.disable)
    # on a CPU a step takes a fifth less time with the channels innermost, and a GPU's fast kernels want them there
    return model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # the stub lacks memory_format


def step_memory(
    model: nn.Module, data: cifar.Data, plan: cifar.EpochPlan, *, pad: int, execution: Execution
) -> dict[str, int]:
    """Return the fields of ``StepMemory`` for one training step, which a copy of the model takes.

    Args:
        model: the network.
        data: the images, on the device of the model.
        plan: the batch: a part of an epoch's plan.
        pad: pixels of padding before the crop.
        execution: gives the precision of the forward pass.
    """
    model = copy.deepcopy(model)
    images, labels = cifar.batch(data, plan, pad=pad)
    images = images.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        with execution.autocast(images.device):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return asdict(measure_step_memory(model, step))
