#!/usr/bin/env python3
"""Print test accuracy and loss of a run's checkpoint, beside those in its record.

    python -m memcnn.evaluate runs/revnet38-cifar10-published-s0

Exit status: 0 evaluated, 1 the data is missing or damaged, 2 misuse, such as a folder without record and checkpoint.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from memcnn import cli
from memcnn import data as cifar
from memcnn.data import BadData, DataNotFound
from memcnn.training.checkpoint import BadCheckpoint
from memcnn.training.execution import Execution
from memcnn.training.record import FILE_NAME, BadRecord, RunRecord
from memcnn.training.step import Evaluation
from memcnn.weights import load_run


def evaluate(
    model: nn.Module, data: cifar.Data, *, images: int | None = None, execution: Execution | None = None
) -> tuple[float, float]:
    """Return mean loss (nats) and accuracy (percent) on the test images, evaluated as in training.

    Args:
        model: the network, on the device of ``data``. It is left in evaluation mode and in channels_last.
        data: the images.
        images: how many test images to evaluate, from the first; None for all.
        execution: how the evaluation is executed; by default in float32.
    """
    model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stub lacks memory_format
    how = execution or Execution()
    with how.settings(data.mean.device):
        return Evaluation(model, data, how, images=images).result()


def execution_of(record: RunRecord) -> Execution:
    """Return the execution to evaluate a run: the precision of its last segment, and no option that only saves time."""
    return Execution(precision=record.segments[-1].execution.partition(",")[0])


def check_folder(folder: Path) -> None:
    """Raise Misuse if the path is not the folder of a run."""
    wanted = "wanted the folder of a run, such as runs/revnet38-cifar10-published-s0; see python -m memcnn.train --list"
    if not folder.exists():
        raise cli.Misuse(f"{folder}: there is no such folder; {wanted}")
    if not folder.is_dir():
        raise cli.Misuse(f"{folder} is a file; {wanted}")
    if not (folder / FILE_NAME).exists():
        raise cli.Misuse(f"{folder} holds no {FILE_NAME}, so it is no run; {wanted}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = cli.parser_from("memcnn.evaluate", __doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="with record.json and checkpoint.pt")
    option = parser.add_argument
    default = "generated if the run was trained on generated images, else $MEMCNN_DATA, else ./data"
    option("--data", metavar="FOLDER", help=f'folder of the CIFAR files, or the word "generated" (default: {default})')
    option("--unofficial-data", action="store_true", help="evaluate on files with wrong checksums too")
    option("--device", choices=cli.devices(), default=cli.devices()[0], help="(default: %(default)s)")
    option("--threads", type=cli.threads, metavar="N", help="CPU threads (default: PyTorch's choice)")
    return parser


@cli.command("memcnn.evaluate")
def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate the run; return the exit status."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    cli.use_threads(given.threads)
    check_folder(given.folder)
    try:
        model, record, iterations = load_run(given.folder, device=given.device)
        where = given.data or (cifar.GENERATED if record.data_kind == "generated" else None)
        data = cifar.load(record.dataset, where, unofficial=given.unofficial_data)
    except (BadRecord, BadCheckpoint) as error:
        parser.error(str(error))
    except (BadData, DataNotFound, OSError) as error:
        return cli.fail(error)
    images = record.recipe.test_images
    loss, accuracy = evaluate(model, data.to(given.device), images=images, execution=execution_of(record))
    count = f"{len(data.test_images[:images]):,} images"
    if data.checksums != record.data["checksums"]:
        count += ", other data than in its training"
    print(f"{record.model} on {record.dataset}, after iteration {iterations} of {record.recipe.iterations}:")
    print(f"  test accuracy {accuracy:.2f} %, loss {loss:.4f}, on {count}")
    if record.test_iteration is not None:
        there = f"{record.test_accuracy:.2f} %, loss {record.test_loss:.4f}, after iteration {record.test_iteration}"
        print(f"  in its record {there}{record.mark}")
    return cli.DONE


if __name__ == "__main__":
    sys.exit(main())
