"""Rebuild the published table of accuracy and time from records of training runs; --train first runs what is missing.

    python -m bench.reproduce_table                       render what there is
    python -m bench.reproduce_table --train --seeds 0-2   every model on both data sets with three seeds, then render

Stopped by --budget or Ctrl-C, the same command goes on where it was. Exit status: 0 every wanted cell is complete
(always without --train), 3 some are incomplete, 1 some failed, 2 misuse.
"""
import argparse
import re
import shutil
import sys
import time
from itertools import product
from pathlib import Path

import torch

import reports
from memcnn.data import GENERATED, whereabouts
from memcnn.train import duration
from memcnn.training.recipe import RECIPES
from memcnn.training.record import DATASETS, BadRecord, RunRecord, load, run_name
from memcnn.training.text import clean
from memcnn.training.trainer import train
from reports import cells

# Those of a kind side by side, the quick ones first.
MODELS = ("resnet32", "revnet38", "resnet110", "revnet110", "resnet164", "revnet164")
RESERVED_SECONDS = 10.0  # of the budget, for start-up and rendering


def seed_list(text: str) -> list[int]:
    """[0, 1, 2, 5] from "0-2,5"."""
    seeds = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", word.strip())
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted seeds like 0-4 or 0,1,2")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(seeds))


def choice_list(choices: tuple[str, ...]):
    """A parser of "a,b" into those of `choices` that are named, in the order of `choices`."""

    def parse(text: str) -> list[str]:
        wanted = [word.strip() for word in text.split(",") if word.strip()]
        if unknown := [word for word in wanted if word not in choices]:
            raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}: choose from {','.join(choices)}")
        if not wanted:
            raise argparse.ArgumentTypeError(f"got nothing: choose from {','.join(choices)}")
        return [choice for choice in choices if choice in wanted]

    return parse


def build_parser() -> argparse.ArgumentParser:
    usage, status = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="bench.reproduce_table",
        description=usage,
        epilog=status,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    out = Path(reports.__file__).with_name("out")
    folder, names = {"metavar": "FOLDER"}, {"metavar": "A,B,..."}
    add = parser.add_argument
    add("--runs", default="runs", **folder, help="training output (default: ./%(default)s)")
    add("--records", default=reports.RECORDS, **folder, help="committed records (default: reports/records)")
    add("--out", default=out, **folder, help="where the tables go (default: reports/out)")
    add("--train", action="store_true", help="first run the cells that are not complete")
    add = parser.add_argument_group("with --train").add_argument
    add("--models", type=choice_list(MODELS), default=list(MODELS), **names, help=f"of {','.join(MODELS)}")
    add("--datasets", type=choice_list(DATASETS), default=list(DATASETS), **names, help=f"of {','.join(DATASETS)}")
    add("--seeds", type=seed_list, default=[0], metavar="LIST", help="0-4 or 0,1,2 (default: 0); a verdict needs three")
    add("--recipe", choices=RECIPES, default="published", help="set of hyper-parameters (default: %(default)s)")
    add("--device", help="cpu, cuda, cuda:1 ... (default: cuda where there is one, else cpu)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    add("--budget", type=duration, metavar="TIME", help="be done before so much time is over: 90s, 9m, 1h30m")
    data = "(default: $MEMCNN_DATA, else ./data; downloaded when missing)"
    add("--data", **folder, help=f'the CIFAR files, or the word "generated" for made-up images {data}')
    return parser


def main(arguments: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = build_parser()
    given = parser.parse_args(arguments)
    if given.threads is not None and given.threads < 1:
        parser.error(f"argument --threads: got {given.threads}, wanted at least 1")
    status = 0
    if given.train:
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        status = train_cells(given, None if given.budget is None else started + given.budget - RESERVED_SECONDS)
    report = reports.build(given.runs, given.records)
    paths = reports.write(report, given.out)
    print(reports.terminal(report, width=min(120, shutil.get_terminal_size((120, 24)).columns)))
    print("\nWritten", *paths, sep="\n  ")
    return status


def train_cells(given: argparse.Namespace, deadline: float | None) -> int:
    """Run every wanted cell that is not complete, a line each; the exit status. `deadline` is a time.monotonic().

    Every cell gets its first seed before any gets its second, and CIFAR-10 comes before CIFAR-100.
    """
    wanted = list(product(given.seeds, given.datasets, given.models))
    complete, failures, stopped = 0, [], None
    for place, (seed, dataset, model) in enumerate(wanted, 1):
        line = f"[{place:>{len(str(len(wanted)))}}/{len(wanted)}] {model:<9} {dataset:<8} s{seed}  "
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            stopped = "budget exhausted"
            break
        try:
            record = _committed(given, model, dataset, seed) or train(
                model,
                dataset,
                recipe=RECIPES[given.recipe],
                seed=seed,
                data=given.data,
                runs=given.runs,
                device=given.device,
                budget_seconds=remaining,
                progress=sys.stderr.isatty(),
            )
        except KeyboardInterrupt:
            stopped = "interrupted"
            break
        except Exception as error:  # whatever ails one cell, the others go on
            text = clean(f"{type(error).__name__}: {error}")
            print(f"{line}failed: {'as above' if text in failures else text}", flush=True)
            failures.append(text)
            continue
        print(line + _outcome(record), flush=True)
        complete += record.status == "complete"
        if record.status == "failed":
            failures.append(record.reason)
        if record.status == "partial":
            stopped = record.reason
            break
    said = [f"{complete} of {len(wanted)} cells complete"]
    if failures:
        said.append(f"{len(failures)} failed")
    if stopped:
        said.append(f"stopped ({stopped}); the same command goes on from here")
    print(", ".join(said) + ".\n", flush=True)
    if failures:
        return 1
    return 0 if complete == len(wanted) else 3


def _committed(given: argparse.Namespace, model: str, dataset: str, seed: int) -> RunRecord | None:
    """The complete run of this cell among the committed records, if there is one on the data that are wanted."""
    try:
        record = load(Path(given.records) / run_name(model, dataset, RECIPES[given.recipe], seed))
    except BadRecord:
        return None
    official = whereabouts(given.data) != GENERATED
    return record if record.status == "complete" and record.engine and record.data["official"] == official else None


def _outcome(record: RunRecord) -> str:
    """accuracy, time and state of a run, for its line."""
    accuracy = cells.DASH if record.test_accuracy is None else f"{record.test_accuracy:.1f}"
    words = f"accuracy {accuracy:>5} %  {cells.duration(record.train_seconds):>5}  {record.status}"
    if not record.data["official"]:
        words += " (generated data)"
    if record.status == "complete":
        return words
    return f"{words} at {record.iterations}/{record.recipe.iterations}: {record.reason}"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
