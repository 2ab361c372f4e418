"""The sentences under the tables: how to read a column, what counts, and which command fills what is missing."""

import pandas as pd

from memcnn.models.resnet import MODELS
from memcnn.training.record import DATASETS
from reports.cells import LABELS
from reports.verdict import LEAST_RUNS, NOT_ENOUGH, WIDEST_POINTS

RESULTS = (
    "Accuracy is the share of the 10,000 test images classified right, in per cent. This project's is that of the last "
    "iterate, never of the best: mean ± sample standard deviation over full runs with different seeds; “runs” "
    "says how many.",
    "A full run completed the published recipe (SGD, batch 100, 80,000 iterations, no hyper-parameter changed) on the "
    "official CIFAR files with the reversible engine on, executed in one way from start to end. Nothing else enters "
    "this table. A run that went on in another precision, or on another type of device, is marked “mixed execution” "
    "and listed under the other runs.",
    "Time is h:mm; below ten minutes it is in minutes and seconds. Published times are from one GeForce GTX 1080. This "
    "project's are training alone, without start-up and evaluation: the mean over the runs, or the shortest and the "
    "longest where they ran on different devices. “Shared by N” marks a time in which up to N runs trained on the "
    "device at once: such a run takes longer than it would alone.",
    "Difference is this project's mean less the published PyTorch value, in percentage points. One cause is known: the "
    "published PyTorch evaluation shifted and mirrored the test images at random, this project's leaves them alone.",
    "Verdict: published values are taken for single runs, so the published PyTorch accuracy is held against the 95 % "
    "prediction interval for one more run, mean ± t · sd · √(1 + 1/n), with t from Student's distribution at n − 1 "
    "degrees of freedom. Inside it is “reproduced”, outside “differs”. It is “not enough "
    f"runs” below {LEAST_RUNS} runs, and where the value lies inside an interval wider than ±{WIDEST_POINTS:.0f} "
    "points, which tells nothing. With 3 runs and a usual sd of 0.2 the interval is ±1.0 point. Of 12 perfectly "
    "reproduced cells, 0.6 would say “differs” by chance.",
    "Published: TensorFlow from revnet-public, the code of arXiv 1707.04585; PyTorch from the MemCNN README, "
    "recomputed 11 June 2018. A dash is a number that nobody measured.",
)

CURVES = (
    "Test accuracy at every evaluation, a line for each run; runs with fewer than three evaluations are left out. "
    "Dashed: generated data, or the reversible engine off."
)

MEMORY = (
    "One training step at batch 100, in MiB (1,048,576 bytes). The published table, in the MemCNN paper, is headed MB, "
    "but its parameter figures come out for all six models only as MiB: parameters and BatchNorm statistics in the "
    "CUDA allocator's blocks of 512 bytes. This project's parameters are the bare tensors.",
    "The published and the other activation columns are two quantities. Published: what PyTorch had allocated when the "
    "forward pass ended, beyond the model. This project: the highest total at any instant of forward and backward, "
    "beyond parameters and gradients. A RevNet is at its highest in the backward pass, which the published figure "
    "leaves out. reports/activations.md recomputes the published quantity and explains every difference.",
    "Tensors, float32: the bytes of all tensors, which are the same on every machine, from the records of runs on a "
    "CPU. Measured on a GPU: what the CUDA allocator handed out, kernels' scratch included, from the records of runs "
    "on a GPU and from reports/bench/*/memory.csv. In bf16 most activations of residual branches take half the bytes; "
    "float32 includes tf32, whose tensors are float32.",
    "Every record at batch 100 with the engine on counts, whatever its length and data: neither changes the shapes. "
    "Where measurements differ, the least and the most are shown; “of published” uses the most.",
)


def summary(table: pd.DataFrame) -> str:
    """Count in one sentence how many cells of the main table have which verdict."""
    count = table["verdict"].value_counts()
    return (
        f"{len(table)} cells: {count.get('reproduced', 0)} reproduced, {count.get('differs', 0)} differ, "
        f"{count.get(NOT_ENOUGH, 0)} without enough full runs."
    )


def executions(runs: pd.DataFrame) -> list[str]:
    """Explain in a sentence for each device and execution how the full runs of the main table were computed."""
    full = runs[runs["full"]]
    lines = []
    for (device, execution), group in full.groupby(["device", "execution"], sort=True):
        pairs = dict.fromkeys(zip(group["model"], group["dataset"], strict=True))
        cells = ", ".join(f"{LABELS[model]} on {LABELS[dataset]}" for model, dataset in pairs)
        how = f" (execution: {execution})" if execution else ""
        lines.append(f"This project, {cells}: {_count(len(group))} on {device}{how}.")
    return lines


def _count(number: int) -> str:
    return f"{number} full run{'' if number == 1 else 's'}"


def command(table: pd.DataFrame) -> str | None:
    """Return the command that runs what the main table lacks; None when every cell has its verdict."""
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
