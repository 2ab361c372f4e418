"""Predict the memory of a training step without computing the step, and the largest batch and depth that fit a device.

    python -m bench.memory revnet110 --batch 100 --device-memory 24GiB
    python -m bench.memory package.module:factory --shape 100,3,224,224 --optimizer adam
    python -m bench.memory --table --out reports/activations.md

A step is forward pass with loss, zero_grad(), backward pass and update. MODEL is one of the six networks, on images of
CIFAR's size, or your own function that returns an nn.Module. Such a module takes one input of --shape, and its loss is
the sum of the means of its outputs.

Counted: every tensor, in the 512-byte blocks of CUDA's caching allocator, with optimisers as they run on CUDA.
Not counted: the CUDA context (about 0.5 GiB), the workspaces of cuDNN and cuBLAS, and free memory between blocks. Set
--reserve for these. The prediction assumes that CUDA's kernels save the same tensors as the CPU's. Under bfloat16
autocast it counts BatchNorm's statistics as bfloat16 where kernels keep float32, which is about 0.03 %. After the
prediction, the command computes a step of at most 8 samples on the CPU and, if there is one, on a CUDA device, and
prints the error of its prediction; --no-check leaves this out.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.memory import published, text
from bench.memory.options import build_parser
from bench.memory.subject import (
    DEPTHS,
    DTYPES,
    MODEL,
    OPTIMIZERS,
    Subject,
    Unusable,
    check,
    largest_batch,
    largest_depth,
    predict,
    progress,
    subject_of,
)
from memcnn import cli

CHECK_BATCH = 8


@cli.command("bench.memory")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return 0; misuse ends the process with status 2."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    parser = build_parser(__doc__, optimizers=OPTIMIZERS, dtypes=DTYPES)
    given = parser.parse_args(arguments)
    if given.table and given.model is not None:
        parser.error(f"argument MODEL: got {given.model!r}, wanted none with --table, which is about all six networks")
    if given.out is not None and not given.table:
        parser.error("argument --out: wanted --table with it; use --json for the numbers of one model")
    if given.table:
        page = published.render(progress=progress)
        if given.out is not None:
            given.out.write_text(page, "utf-8")
        print(page)
        return 0
    if given.model is None:
        parser.error(f"argument MODEL: missing, wanted {MODEL}; or --table")
    if given.device_memory is not None and given.device_memory <= given.reserve:
        parser.error(f"argument --reserve: got {given.reserve} bytes, wanted less than --device-memory")
    with warnings.catch_warnings():
        warnings.simplefilter("once")  # a network has many blocks
        try:
            result = predicted(subject_of(given), given)
        except Unusable as error:
            parser.error(str(error))
    print(text.render(result))
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    return 0


def predicted(subject: Subject, given: argparse.Namespace) -> dict:
    """Return all numbers about one model, in bytes.

    Raises:
        Unusable: when the model cannot be predicted.
    """
    budget_bytes = None if given.device_memory is None else given.device_memory - given.reserve
    result = {
        "model": subject.name,
        "shape": subject.shape,
        "dtype": subject.dtype,
        "disable": given.disable,
        "optimizer": subject.optimizer,
        "torch": torch.__version__,
    }
    progress(f"predicting batch {subject.shape[0]}")
    result["peak"] = asdict(predict(subject, "cuda"))
    result["check"] = [] if given.no_check else check(subject, min(subject.shape[0], CHECK_BATCH))
    result["budget_bytes"], result["reserve_bytes"] = budget_bytes, given.reserve
    result["largest_batch"] = result["largest_depth"] = None
    if budget_bytes is not None:
        result["largest_batch"] = largest_batch(subject, budget_bytes)
        if subject.name in DEPTHS:
            how = {"disable": given.disable, "limit": given.most_units}
            result["largest_depth"] = largest_depth(subject, budget_bytes, **how)
    return result


if __name__ == "__main__":
    sys.exit(main())
