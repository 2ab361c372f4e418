"""The memory of one training step of a run, for its record."""

import copy
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from memcnn import data as cifar
from memcnn.memory import measure_step_memory
from memcnn.training.execution import Execution


def step_memory(
    model: nn.Module, data: cifar.Data, plan: cifar.EpochPlan, *, pad: int, execution: Execution
) -> dict[str, int]:
    """Return the bytes of one training step, as ``StepMemory`` names them. A copy of the model takes the step.

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
