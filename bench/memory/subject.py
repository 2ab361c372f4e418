"""The training step that ``bench.memory`` predicts, and the search for the largest batch and depth that fit."""

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from memcnn.cli import Misuse
from memcnn.memory import PeakSplit, largest_that_fits, measure_peak_split, predict_step_memory, training_step
from memcnn.memory.prediction import SGD
from memcnn.models.resnet import MODELS, CifarResNet, basic_branch, bottleneck_branch
from memcnn.testing.targets import load

OPTIMIZERS = {"sgd": SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "none": None}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
"""Dtypes of autocast; None for no autocast."""
MOST_IMAGES = 2**20
DEPTHS = {
    "resnet32": partial(CifarResNet, basic_branch, channels=(16, 16, 32, 64)),
    "resnet110": partial(CifarResNet, basic_branch, channels=(16, 16, 32, 64)),
    "resnet164": partial(CifarResNet, bottleneck_branch, channels=(16, 16, 32, 64)),
    "revnet38": partial(CifarResNet, basic_branch, channels=(32, 32, 64, 112), reversible=True),
    "revnet110": partial(CifarResNet, basic_branch, channels=(32, 32, 64, 128), reversible=True),
    "revnet164": partial(CifarResNet, bottleneck_branch, channels=(32, 32, 64, 128), reversible=True),
}
"""The six networks as functions of their units a stage."""
MODEL = f"one of {', '.join(MODELS)}, or package.module:factory"
"""Valid values of the argument MODEL, for messages."""


class Unusable(ValueError):
    """Raised if a request cannot be carried out; the message names the given value, the expected one and the fix."""


@dataclass(frozen=True)
class Subject:
    """A model and its training step.

    Attributes:
        name: the model's name, for messages.
        make_model: returns the model.
        shape: the input's shape, the batch first.
        classes: number of classes of the labels; None if the loss is the mean of the output.
        optimizer: a key of ``OPTIMIZERS``.
        dtype: a key of ``DTYPES``.
    """

    name: str
    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int | None
    optimizer: str = "sgd"
    dtype: str = "float32"

    def make_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs of ``shape`` and labels of shape (N,); labels are empty without classes."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.zeros(0) if self.classes is None else torch.arange(self.shape[0]) % self.classes
        return torch.empty(self.shape).normal_(generator=generator), labels

    def of_batch(self, batch: int) -> "Subject":
        """Return the same subject with another batch size."""
        return replace(self, shape=(batch, *self.shape[1:]))

    @property
    def options(self) -> dict:
        """The options of ``memcnn.memory.training_step``."""
        loss = _mean if self.classes is None else F.cross_entropy
        return {"loss": loss, "optimizer": OPTIMIZERS[self.optimizer], "autocast": DTYPES[self.dtype]}


def predict(subject: Subject, device: str) -> PeakSplit:
    """Predict the peak memory of a step on a device ("cpu" or "cuda").

    Raises:
        Unusable: if the model cannot run on fake tensors of the subject's shape.
    """
    try:
        return predict_step_memory(subject.make_model, subject.make_batch, device=device, **subject.options)
    except Exception as error:  # a user's model may raise anything
        raise Unusable(
            f"{subject.name} on an input of shape {subject.shape}: {type(error).__name__}: {_first_line(error)}; "
            "wanted a model that takes one such tensor and does not read its values; see --shape"
        ) from error


def measure(subject: Subject, device: str) -> PeakSplit:
    """Compute the step on a device, and measure its tensors and the bytes of the allocator."""
    model, optimizer, batch, step = training_step(
        lambda: subject.make_model().to(device),
        lambda: tuple(t.to(device) for t in subject.make_batch()),
        **subject.options,
    )
    return measure_peak_split(model, step, optimizer=optimizer, batch=batch, allocator=True)


def check(subject: Subject, batch: int) -> list[dict]:
    """Return predicted and measured peaks at ``batch``, in bytes, one row for each device of this machine."""
    subject = subject.of_batch(batch)
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        progress(f"computing a step at batch {batch} on {device}")
        measured = measure(subject, device)
        rows.append(
            {
                "device": device,
                "batch": batch,
                "predicted_bytes": predict(subject, device).peak_bytes,
                "tensor_bytes": measured.peak_bytes,
                "allocated_bytes": measured.allocated_bytes,
                "reserved_bytes": measured.reserved_bytes,
            }
        )
    return rows


def largest_batch(subject: Subject, budget_bytes: int) -> dict:
    """Search the largest batch whose step on CUDA fits; see ``memcnn.memory.largest_that_fits`` for the result."""

    def peak_bytes(batch: int) -> int:
        progress(f"predicting batch {batch}")
        return predict(subject.of_batch(batch), "cuda").peak_bytes

    return largest_that_fits(peak_bytes, budget_bytes, start=subject.shape[0], limit=MOST_IMAGES)


def largest_depth(subject: Subject, budget_bytes: int, *, disable: bool, limit: int) -> dict:
    """Search the largest number of units a stage for which a network's step on CUDA fits into memory.

    Args:
        subject: one of the six networks.
        budget_bytes: the available bytes.
        disable: run the reversible units by ordinary autograd.
        limit: the largest number of units a stage to try.

    Returns:
        The result of ``memcnn.memory.largest_that_fits``, and ``layers``, the layers that one more unit a stage adds.
    """
    make, units = DEPTHS[subject.name], len(subject.make_model().stages[0])

    def peak_bytes(units: int) -> int:
        progress(f"predicting {units} units a stage")
        make_model = partial(make, units=3 * [units], num_classes=subject.classes, disable=disable)
        return predict(replace(subject, make_model=make_model), "cuda").peak_bytes

    return {**largest_that_fits(peak_bytes, budget_bytes, start=units, limit=limit), "layers": layers(subject.name)}


def layers(name: str) -> int:
    """Return the layers that one more unit in each of the three stages adds to a network's name.

    A network's name counts these layers for each unit of a stage, and two more: the stem and the classifier.
    """
    make = DEPTHS[name]
    of_branch = 2 if make.args[0] is basic_branch else 3
    return 3 * of_branch * (2 if make.keywords.get("reversible") else 1)


def subject_of(given: Namespace) -> Subject:
    """Return the subject that the command line asks for.

    Raises:
        Unusable: if options contradict each other, or the model cannot be imported.
    """
    how = {"optimizer": given.optimizer, "dtype": given.dtype}
    if given.model in MODELS:
        if given.shape is not None:
            raise Unusable(f"argument --shape: got it with {given.model}, whose images are 3,32,32; wanted --batch")
        make_model = partial(MODELS[given.model], given.classes, disable=given.disable)
        return Subject(given.model, make_model, (given.batch or 100, 3, 32, 32), given.classes, **how)
    if given.disable:
        raise Unusable("argument --disable: wanted one of the six networks; build a model of your own without it")
    make_model = _factory(given.model)
    if given.shape is None:
        raise Unusable(f"argument --shape: missing, wanted the input's shape for {given.model}, like 100,3,32,32")
    shape = given.shape if given.batch is None else (given.batch, *given.shape[1:])
    return Subject(given.model, make_model, shape, None, **how)


def progress(text: str) -> None:
    """Print a line of progress to standard error."""
    print(f"  {text} ...", file=sys.stderr, flush=True)


def _factory(name: str) -> Callable[[], nn.Module]:
    """Return a function that makes the model called "package.module:function" or "path.py:function"."""
    if ":" not in name:
        raise Unusable(f"argument MODEL: got {name!r}, wanted {MODEL}")
    try:
        make = load(name)
    except Misuse as error:
        raise Unusable(f"argument MODEL: {str(error).removeprefix('target: ')}") from error

    def make_model() -> nn.Module:
        model = make()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} returned {type(model).__name__}, wanted an nn.Module")
        return model

    return make_model


def _mean(outputs: object, _: Tensor) -> Tensor:
    """Return the sum of the means of all floating-point outputs."""
    return sum(y.float().mean() for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
