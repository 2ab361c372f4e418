"""The tables as frames of text, which all output formats share.

Columns are (group, name) pairs. Only this file rounds numbers. An em dash stands for a number that was not measured.
"""

import pandas as pd

from memcnn.models.resnet import MODELS
from memcnn.training.record import DATASETS
from reports.tables import GPU_PRECISIONS

DASH = "\N{EM DASH}"
LABELS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
    "resnet32": "ResNet-32", "resnet110": "ResNet-110", "resnet164": "ResNet-164",
    "revnet38": "RevNet-38", "revnet110": "RevNet-110", "revnet164": "RevNet-164",
}  # fmt: skip
TENSORFLOW, PYTORCH, OURS = "TensorFlow, published", "PyTorch, published", "this project"
TENSORS, ON_GPU = "tensors, float32", "measured on a GPU, activations MiB"


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Format with fixed decimals and a true minus sign; a missing value becomes a dash."""
    if pd.isna(value):
        return DASH
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def hours(minutes: float) -> str:
    """Format minutes as "h:mm", as the published table does."""
    if pd.isna(minutes):
        return DASH
    whole, rest = divmod(round(minutes), 60)
    return f"{whole}:{rest:02d}"


def duration(seconds: float) -> str:
    """Format seconds as "h:mm:ss"."""
    if pd.isna(seconds):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def spread(least: str, most: str) -> str:
    """Join two values as a range, or return one of them if they are equal."""
    return least if least == most else f"{least}\N{EN DASH}{most}"


def accuracy(row: pd.Series) -> str:
    """Format the mean and the sample standard deviation of the full runs; only the mean for a single run."""
    mean = number(row["mean_percent"], 2)
    return mean if pd.isna(row["sd_percent"]) else f"{mean} ± {number(row['sd_percent'], 2)}"


def time(row: pd.Series) -> str:
    """Return the mean training time; for different kinds of device, the shortest and the longest time.

    If a run shared its device with others, add the largest number of runs that shared it.
    """
    if not pd.isna(row["devices"]) and ";" in row["devices"]:
        text = spread(duration(row["seconds_least"]), duration(row["seconds_most"]))
    else:
        text = duration(row["seconds_mean"])
    return text + sharing(row["shared_by"])


def sharing(runs: float) -> str:
    """Return the remark for a training time that was measured while ``runs`` runs trained on the device."""
    return f" (shared by {runs:.0f})" if runs > 1 else ""


def run_time(rows: pd.DataFrame) -> list[str]:
    """Return the training time of each run, with the number of runs that shared its device if there were others."""
    pairs = zip(rows["train_seconds"], rows["shared_by"], strict=True)
    return [duration(seconds) + sharing(runs) for seconds, runs in pairs]


def results(table: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """Return the main table of one data set, with one row for each model."""
    rows = table.loc[dataset].reset_index()
    columns = {
        ("", "model"): rows["model"].map(LABELS),
        (TENSORFLOW, "accuracy %"): rows["tensorflow_accuracy_percent"].map(lambda value: number(value, 2)),
        (TENSORFLOW, "time"): rows["tensorflow_minutes"].map(hours),
        (PYTORCH, "accuracy %"): rows["pytorch_accuracy_percent"].map(lambda value: number(value, 2)),
        (PYTORCH, "time"): rows["pytorch_minutes"].map(hours),
        (OURS, "accuracy %"): rows.apply(accuracy, axis=1),
        (OURS, "runs"): rows["n"].map(str),
        (OURS, "time"): rows.apply(time, axis=1),
        (OURS, "95 % interval"): [
            DASH if pd.isna(low) else f"{number(low, 2)}\N{EN DASH}{number(high, 2)}"
            for low, high in zip(rows["low_percent"], rows["high_percent"], strict=True)
        ],
        (OURS, "difference"): rows["difference_points"].map(lambda value: number(value, 2, sign=True)),
        (OURS, "verdict"): rows["verdict"],
    }
    return pd.DataFrame(columns)


def cards(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the main table for a narrow screen: a frame for each model, with a column for each data set."""
    lines = ("TensorFlow", "PyTorch", OURS, "runs", "95 % interval", "difference", "verdict")
    tables = {dataset: results(table, dataset) for dataset in DATASETS}
    made = {}
    for place, model in enumerate(MODELS):
        columns = {("", ""): lines}
        for dataset in DATASETS:
            row = tables[dataset].iloc[place]
            pairs = [f"{row[group, 'accuracy %']}, {row[group, 'time']}" for group in (TENSORFLOW, PYTORCH)]
            ours = DASH if row[OURS, "runs"] == "0" else f"{row[OURS, 'accuracy %']}, {row[OURS, 'time']}"
            rest = [row[OURS, name] for name in ("runs", "95 % interval", "difference", "verdict")]
            columns["", LABELS[dataset]] = [*pairs, ours, *rest]
        made[LABELS[model]] = pd.DataFrame(columns)
    return made


def memory(table: pd.DataFrame) -> pd.DataFrame:
    """Return the memory table, in MiB."""
    rows = table.reset_index()
    published, ours = "published (PyTorch)", TENSORS
    ratio = rows["most_mib"] / rows["published_activations_mib"]
    measured = {(ON_GPU, name): _range(rows, name) for name in GPU_PRECISIONS}
    columns = {
        ("", "model"): rows["model"].map(LABELS),
        (published, "parameters MiB"): rows["published_parameters_mib"].map(lambda value: number(value, 1)),
        (published, "activations MiB"): rows["published_activations_mib"].map(lambda value: number(value, 1)),
        (ours, "parameters MiB"): rows["parameters_mib"].map(lambda value: number(value, 1)),
        (ours, "activations MiB"): _range(rows, ""),
        (ours, "of published"): [DASH if pd.isna(value) else f"{value:.0%}".replace("%", " %") for value in ratio],
        (ours, "records"): rows["records"].map(str),
        **measured,
        (ON_GPU, "device"): rows["gpu_devices"].fillna(DASH),
    }
    return pd.DataFrame(columns)


def narrow_memory(table: pd.DataFrame) -> pd.DataFrame:
    """Return the memory table without the columns that do not fit on a terminal or a printed page."""
    return memory(table).drop(columns=[(TENSORS, "of published"), (TENSORS, "records"), (ON_GPU, "device")])


def _range(rows: pd.DataFrame, precision: str) -> list[str]:
    prefix = f"gpu_{precision}_" if precision else ""
    pairs = zip(rows[f"{prefix}least_mib"], rows[f"{prefix}most_mib"], strict=True)
    return [spread(number(least, 1), number(most, 1)) for least, most in pairs]


def full_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run in the main table."""
    rows = runs[runs["full"]]
    return _flat(
        {
            **_who(rows),
            "accuracy %": rows["accuracy_percent"].map(lambda value: number(value, 2)),
            "time": run_time(rows),
            "interruptions": rows["interruptions"].map(str),
            "activations MiB": (rows["activation_bytes"] / 2**20).map(lambda value: number(value, 1)),
            "device": rows["device"],
            "execution": rows["execution"].replace("", DASH),
            "torch": rows["torch"],
            "commit": rows["commit"].replace("", DASH),
        }
    )


def other_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each run that does not count, with the reasons."""
    rows = runs[~runs["full"]]
    done = [f"{done:,} / {planned:,}" for done, planned in zip(rows["iterations"], rows["planned"], strict=True)]
    return _flat(
        {
            **_who(rows),
            "iterations": done,
            "accuracy %": [
                number(value, 2) + (" (mixed execution)" if mixed else "")
                for value, mixed in zip(rows["accuracy_percent"], rows["mixed"], strict=True)
            ],
            "time": run_time(rows),
            "activations MiB": (rows["activation_bytes"] / 2**20).map(lambda value: number(value, 1)),
            "batch": rows["batch_size"].map(str),
            "data": rows["data"],
            "device": rows["device"],
            "execution": rows["execution"].replace("", DASH),
            "why it does not count": rows["why"],
        }
    )


def _who(rows: pd.DataFrame) -> dict:
    return {"model": rows["model"].map(LABELS), "data set": rows["dataset"].map(LABELS), "seed": rows["seed"].map(str)}


def _flat(columns: dict) -> pd.DataFrame:
    return pd.DataFrame({("", name): list(values) for name, values in columns.items()}, dtype=object)
