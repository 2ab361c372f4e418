"""How much memory a training step needs, predicted without computing it, and what fits a device.

    python -m bench.memory revnet110 --batch 100 --device-memory 24GiB
    python -m bench.memory package.module:factory --shape 100,3,224,224 --optimizer adam
    python -m bench.memory --table --out reports/activations.md

A step is forward pass and loss, backward pass, update. MODEL is one of the six networks, on CIFAR's images, or a
function of yours that returns an nn.Module, of one input of --shape, whose loss is then the mean of its output.

Counted: every tensor, in the 512-byte blocks of CUDA's caching allocator, with optimisers as they run on CUDA. Not
counted: the CUDA context (some 0.5 GiB), what cuDNN and cuBLAS borrow for a kernel, and free memory between blocks: set
--reserve for them. Kernels are taken to save what the CPU's save; under bfloat16 autocast BatchNorm's statistics count
as bfloat16 where kernels keep float32, some 0.03 %. The prediction is measured on the spot against a step that is
computed, on the CPU and, where there is one, on a CUDA device.
"""

import argparse
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bench import activations, memory_text
from bench.fitting import largest_that_fits
from memcnn.models.resnet import MODELS, CifarResNet, basic_branch, bottleneck_branch
from memcnn.testing.memory import PeakSplit, measure_peak_split
from memcnn.testing.prediction import SGD, predict_step_memory, training_step

OPTIMIZERS = {
    "sgd": SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "none": None,
}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # of autocast
MOST_IMAGES = 2**20
CHECK_BATCH = 8
DEPTHS = {  # the networks by their units a stage
    "resnet32": partial(CifarResNet, basic_branch, channels=(16, 16, 32, 64)),
    "resnet110": partial(CifarResNet, basic_branch, channels=(16, 16, 32, 64)),
    "resnet164": partial(CifarResNet, bottleneck_branch, channels=(16, 16, 32, 64)),
    "revnet38": partial(CifarResNet, basic_branch, channels=(32, 32, 64, 112), reversible=True),
    "revnet110": partial(CifarResNet, basic_branch, channels=(32, 32, 64, 128), reversible=True),
    "revnet164": partial(CifarResNet, bottleneck_branch, channels=(32, 32, 64, 128), reversible=True),
}


_MODEL = f"one of {', '.join(MODELS)}, or package.module:factory"


class Unusable(ValueError):
    """What was asked for cannot be done; the message says what was got, what is wanted, and the fix."""


@dataclass(frozen=True)
class Subject:
    """What is trained: a model, its input's shape with the batch first, its loss, and how."""

    name: str
    make_model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int | None  # of the labels; None for the mean of the output as loss
    optimizer: str = "sgd"
    dtype: str = "float32"

    def make_batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        labels = torch.zeros(0) if self.classes is None else torch.arange(self.shape[0]) % self.classes
        return torch.empty(self.shape).normal_(generator=generator), labels

    def of_batch(self, batch: int) -> "Subject":
        return replace(self, shape=(batch, *self.shape[1:]))

    @property
    def options(self) -> dict:
        loss = _mean if self.classes is None else F.cross_entropy
        return {"loss": loss, "optimizer": OPTIMIZERS[self.optimizer], "autocast": DTYPES[self.dtype]}


def predict(subject: Subject, device: str) -> PeakSplit:
    try:
        return predict_step_memory(subject.make_model, subject.make_batch, device=device, **subject.options)
    except Exception as error:  # whatever a user's model raises
        raise Unusable(
            f"{subject.name} on an input of shape {subject.shape}: {type(error).__name__}: {_first_line(error)}; "
            "wanted a model that takes one such tensor and looks at no values, see --shape"
        ) from error


def measure(subject: Subject, device: str) -> PeakSplit:
    """The same step computed, by the tensor meter and by the allocator."""
    model, optimizer, batch, step = training_step(
        lambda: subject.make_model().to(device), lambda: tuple(t.to(device) for t in subject.make_batch()),
        **subject.options,
    )  # fmt: skip
    return measure_peak_split(model, step, optimizer=optimizer, batch=batch, allocator=True)


def check(subject: Subject, batch: int) -> list[dict]:
    """Predicted and measured peaks at `batch`, a row a device."""
    subject = subject.of_batch(batch)
    rows = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        _progress(f"computing a step at batch {batch} on {device}")
        measured = measure(subject, device)
        rows.append({
            "device": device, "batch": batch, "predicted_bytes": predict(subject, device).peak_bytes,
            "tensor_bytes": measured.peak_bytes, "allocated_bytes": measured.allocated_bytes,
            "reserved_bytes": measured.reserved_bytes,
        })  # fmt: skip
    return rows


def largest_batch(subject: Subject, budget_bytes: int) -> dict:
    def peak_bytes(batch: int) -> int:
        _progress(f"predicting batch {batch}")
        return predict(subject.of_batch(batch), "cuda").peak_bytes

    return largest_that_fits(peak_bytes, budget_bytes, start=subject.shape[0], limit=MOST_IMAGES)


def largest_depth(subject: Subject, budget_bytes: int, *, disable: bool, limit: int) -> dict:
    make, units = DEPTHS[subject.name], len(subject.make_model().stages[0])

    def peak_bytes(units: int) -> int:
        _progress(f"predicting {units} units a stage")
        make_model = partial(make, units=3 * [units], num_classes=subject.classes, disable=disable)
        return predict(replace(subject, make_model=make_model), "cuda").peak_bytes

    return {**largest_that_fits(peak_bytes, budget_bytes, start=units, limit=limit), "layers": layers(subject.name)}


def layers(name: str) -> int:
    """Of a stage's unit, as these networks are named: three stages of units, the stem, and the classifier."""
    make = DEPTHS[name]
    of_branch = 2 if make.args[0] is basic_branch else 3
    return 3 * of_branch * (2 if make.keywords.get("reversible") else 1)


def subject_of(given: argparse.Namespace) -> Subject:
    """The subject that the command line asks for, or Unusable."""
    how = {"optimizer": given.optimizer, "dtype": given.dtype}
    if given.model in MODELS:
        if given.shape is not None:
            raise Unusable(f"argument --shape: got {given.model}, whose images are 3,32,32: wanted --batch instead")
        make_model = partial(MODELS[given.model], given.classes, disable=given.disable)
        return Subject(given.model, make_model, (given.batch or 100, 3, 32, 32), given.classes, **how)
    if given.disable:
        raise Unusable("argument --disable: wanted one of the six networks; build a model of your own without it")
    make_model = _factory(given.model)
    if given.shape is None:
        raise Unusable(f"argument --shape: missing, wanted the input's shape for {given.model}, like 100,3,32,32")
    shape = given.shape if given.batch is None else (given.batch, *given.shape[1:])
    return Subject(given.model, make_model, shape, None, **how)


def _factory(name: str) -> Callable[[], nn.Module]:
    module, _, function = name.partition(":")
    if not module or not function:
        raise Unusable(f"argument MODEL: got {name!r}, wanted {_MODEL}")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise Unusable(f"argument MODEL: got {name!r}: {error}; wanted an importable module and a function in it, run "
                       "from the folder where `import` finds it") from error  # fmt: skip

    def make_model() -> nn.Module:
        model = make()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} returned {type(model).__name__}, wanted an nn.Module")
        return model

    return make_model


def _mean(outputs: object, _: Tensor) -> Tensor:
    return sum(y.float().mean() for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _progress(text: str) -> None:
    print(f"  {text} ...", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    parser = memory_text.build_parser(__doc__, optimizers=OPTIMIZERS, dtypes=DTYPES)
    given = parser.parse_args(arguments)
    if given.table and given.model is not None:
        parser.error(f"argument MODEL: got {given.model!r}, wanted none with --table, which is about all six networks")
    if given.out is not None and not given.table:
        parser.error("argument --out: wanted --table, which it is for; --json takes the numbers of one model")
    if given.table:
        text = activations.render(progress=_progress)
        if given.out is not None:
            given.out.write_text(text, "utf-8")
        print(text)
        return 0
    if given.model is None:
        parser.error(f"argument MODEL: missing, wanted {_MODEL}; or --table")
    budget_bytes = None if given.device_memory is None else given.device_memory - given.reserve
    if budget_bytes is not None and budget_bytes <= 0:
        parser.error(f"argument --reserve: got {given.reserve} bytes, wanted less than --device-memory")
    with warnings.catch_warnings():
        warnings.simplefilter("once")  # a network has many blocks
        try:
            subject = subject_of(given)
            result = {"model": subject.name, "shape": subject.shape, "dtype": subject.dtype, "disable": given.disable,
                      "optimizer": subject.optimizer, "torch": torch.__version__}  # fmt: skip
            _progress(f"predicting batch {subject.shape[0]}")
            result["peak"] = asdict(predict(subject, "cuda"))
            result["check"] = [] if given.no_check else check(subject, min(subject.shape[0], CHECK_BATCH))
            result["budget_bytes"], result["reserve_bytes"] = budget_bytes, given.reserve
            result["largest_batch"] = result["largest_depth"] = None
            if budget_bytes is not None:
                result["largest_batch"] = largest_batch(subject, budget_bytes)
                if subject.name in DEPTHS:
                    how = {"disable": given.disable, "limit": given.most_units}
                    result["largest_depth"] = largest_depth(subject, budget_bytes, **how)
        except Unusable as error:
            parser.error(str(error))
    print(memory_text.render(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
