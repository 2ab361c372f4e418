"""The sentences under the tables: the meaning of each column, which runs count, and the command for missing runs."""

from itertools import product

import pandas as pd

from memcnn.models.resnet import MODELS
from memcnn.training.recipe import PUBLISHED
from memcnn.training.record import DATASETS
from reports.cells import LABELS
from reports.verdict import LEAST_RUNS, NOT_ENOUGH, WIDEST_POINTS

RESULTS = (
    "Accuracy is the percentage of the 10,000 test images that are classified correctly. For this project it is the "
    "accuracy of the last iterate, not of the best one: mean ± sample standard deviation over full runs with different "
    "seeds. “runs” is the number of these runs.",
    "A full run completed the published recipe (SGD, batch 100, 80,000 iterations, no hyper-parameter changed) on "
    "the official CIFAR files with the reversible engine on and the same execution from start to end. Only full runs "
    "enter this table. A run that was resumed in another precision, or on another type of device, is marked “mixed "
    "execution” and listed under the other runs.",
    "Published times, as h:mm, are from one GeForce GTX 1080. "
    "This project's times are training only, without start-up and evaluation: the mean over the runs or, if they ran "
    "on different devices, the shortest and the longest. “Shared by N” means that up to N runs trained on the device "
    "at the same time; such a run takes longer than it would alone.",
    "Difference is this project's mean minus the published PyTorch value, in percentage points. One cause is known: "
    "the published PyTorch evaluation shifted and mirrored the test images at random; this project does not change "
    "them.",
    "Verdict: we take each published value as the result of one run. So the published PyTorch accuracy is compared "
    "with the 95 % prediction interval for one more run, mean ± t · sd · √(1 + 1/n), with t from Student's "
    "distribution with n − 1 degrees of freedom. A value inside is “reproduced”, a value outside “differs”. The "
    f"verdict is “not enough runs” with fewer than {LEAST_RUNS} runs, or if the value lies inside an interval wider "
    f"than ±{WIDEST_POINTS:.0f} points, which proves nothing. With 3 runs and a typical sd of 0.2 the interval is "
    "±1.0 point. If all 12 cells were perfectly reproduced, 0.6 of them would be expected to say “differs” by "
    "chance.",
    "Published: TensorFlow from revnet-public, the code of arXiv 1707.04585; PyTorch from the MemCNN README, "
    "recomputed 11 June 2018. A dash is a number that nobody measured.",
)

CURVES = (
    "Test accuracy at every evaluation, with a line for each run. Runs with fewer than three evaluations are left out. "
    "Dashed lines: generated data, or the reversible engine off."
)

MEMORY = (
    "One training step at batch 100, in MiB (1,048,576 bytes). The published table, in the MemCNN paper, is labelled "
    "MB. But the parameter numbers of all six models match only in MiB, for parameters and BatchNorm statistics in "
    "the CUDA allocator's blocks of 512 bytes. This project's parameters are the tensors without such blocks.",
    "The published activations are another quantity than the other activation columns. Published: the bytes that "
    "PyTorch had allocated after the forward pass, without the model. This project: the highest total during forward "
    "and backward, without parameters and gradients. A RevNet reaches its peak in the backward pass, which the "
    "published number leaves out. reports/activations.md recomputes the published quantity and explains every "
    "difference.",
    "Tensors, float32: the bytes of all tensors, which are the same on every machine, from the records of runs on a "
    "CPU. Measured on a GPU: the bytes that the CUDA allocator gave out, with the kernels' workspaces, from the "
    "records of runs on a GPU and from reports/bench/*/memory.csv. In bf16 most activations of residual branches "
    "take half the bytes; float32 includes tf32, whose tensors are float32.",
    "Every record at batch 100 with the engine on counts, because neither the length of a run nor its data change the "
    "shapes. If measurements differ, the table shows the smallest and the largest; “of published” uses the largest.",
)


RUNS = "n: the number of full runs, each with another seed."
SHARED = "Shared by N: up to N runs trained on the device at once, so each took longer than it would alone."


def summary(table: pd.DataFrame) -> str:
    """Return a sentence with the number of cells for each verdict."""
    count = table["verdict"].value_counts()
    return (
        f"{len(table)} cells: {count.get('reproduced', 0)} reproduced, {count.get('differs', 0)} differ, "
        f"{count.get(NOT_ENOUGH, 0)} without a verdict, which needs at least {LEAST_RUNS} full runs."
    )


def answer(table: pd.DataFrame) -> list[str]:
    """Return what the runs show, a sentence for each verdict and for each cell that has runs but no verdict."""
    lines = [summary(table)]
    for verdict in ("reproduced", "differs"):
        named = [_cell(place, row) for place, row in table[table["verdict"] == verdict].iterrows()]
        if named:
            lines.append(f"{verdict.capitalize()}: {'; '.join(named)}.")
    begun = table[(table["verdict"] == NOT_ENOUGH) & (table["n"] > 0)]
    lines += [f"No verdict yet: {'; '.join(_cell(place, row) for place, row in begun.iterrows())}."] * bool(len(begun))
    return lines


def _cell(place: tuple[str, str], row: pd.Series) -> str:
    dataset, model = place
    published = row["pytorch_accuracy_percent"]
    return (
        f"{LABELS[model]} on {LABELS[dataset]}, {row['mean_percent']:.2f} % from {_count(int(row['n']))} (published "
        f"{published:.2f} %)"
    )


def effort(table: pd.DataFrame, steps: pd.DataFrame) -> list[str]:
    """Return how long the missing runs take on each device, from measured times of a step.

    Args:
        table: the main table, see ``reports.tables.results_table``.
        steps: see ``reports.tables.step_times``.
    """
    lacking = table[table["verdict"] == NOT_ENOUGH].reset_index()
    missing = {
        model: int((LEAST_RUNS - rows["n"]).clip(lower=1).sum()) for model, rows in lacking.groupby("model", sort=False)
    }
    if not missing:
        return []
    lines = [f"Missing for a verdict in every cell: {sum(missing.values())} full runs, at least {LEAST_RUNS} a cell."]
    for device, rows in steps.groupby("device", sort=True):
        seconds = rows.set_index("model")["seconds"]
        known = [model for model in MODELS if model in missing and model in seconds.index]
        hours = sum(missing[model] * seconds[model] for model in known) * PUBLISHED.iterations / 3600
        rest = [LABELS[model] for model in MODELS if model in missing and model not in known]
        runs = sum(missing[model] for model in known)
        if runs:
            without = f"; not measured there: {', '.join(rest)}" if rest else ""
            lines.append(f"On {device} {runs} of them take about {_time(hours)}, one after the other{without}.")
    return lines


def _time(hours: float) -> str:
    """Return hours as text in minutes, hours or days."""
    if hours < 2:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:.0f} hours" if hours < 72 else f"{hours / 24:.0f} days"


def executions(runs: pd.DataFrame) -> list[str]:
    """Return a sentence for each cell of the main table with full runs: the device and the execution of each run."""
    full = runs[runs["full"]]
    lines = []
    for dataset, model in product(DATASETS, MODELS):
        rows = full[(full["model"] == model) & (full["dataset"] == dataset)]
        parts = {
            f"on {device}" + (f" (execution: {execution})" if execution else ""): len(part)
            for (device, execution), part in rows.groupby(["device", "execution"], sort=True)
        }
        if parts:
            several = ": " + ", ".join(f"{number} {how}" for how, number in parts.items())
            how = several if len(parts) > 1 else f" {next(iter(parts))}"
            lines.append(f"{LABELS[model]} on {LABELS[dataset]}: {_count(len(rows))}{how}.")
    return lines


def _count(number: int) -> str:
    return f"{number} full run{'' if number == 1 else 's'}"


def command(table: pd.DataFrame) -> str | None:
    """Return the command that trains the missing runs of the main table; None if every cell has a verdict."""
    lacking = table[table["verdict"] == NOT_ENOUGH].reset_index()
    if lacking.empty:
        return None
    words = ["python -m bench.reproduce_table --train"]
    for option, names, everything in (("models", lacking["model"], MODELS), ("datasets", lacking["dataset"], DATASETS)):
        wanted = [name for name in everything if name in set(names)]
        if len(wanted) < len(everything):
            words.append(f"--{option} {','.join(wanted)}")
    seeds = LEAST_RUNS if (lacking["n"] < LEAST_RUNS).all() else lacking["n"].max() + 2
    return " ".join([*words, f"--seeds 0-{seeds - 1}"])
