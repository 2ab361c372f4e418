"""The tables as a reader sees them: frames of finished text, the same for every format.

Columns are (group, name) pairs. A number is rounded here and nowhere else; what was not measured is an em dash.
"""
import pandas as pd

from memcnn.models.resnet import MODELS
from memcnn.training.record import DATASETS

DASH = "\N{EM DASH}"
LABELS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100",
    "resnet32": "ResNet-32", "resnet110": "ResNet-110", "resnet164": "ResNet-164",
    "revnet38": "RevNet-38", "revnet110": "RevNet-110", "revnet164": "RevNet-164",
}  # fmt: skip
TENSORFLOW, PYTORCH, OURS = "TensorFlow, published", "PyTorch, published", "this project"


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """Fixed decimals, with a true minus sign; a dash for a missing value."""
    if pd.isna(value):
        return DASH
    return f"{value:{'+' if sign else ''},.{digits}f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float) -> str:
    """h:mm, or whole seconds with their unit below a minute."""
    if pd.isna(seconds):
        return DASH
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}:{minutes:02d}"


def spread(least: str, most: str) -> str:
    """One value where both are the same text, else from - to."""
    return least if least == most else f"{least}\N{EN DASH}{most}"


def accuracy(row: pd.Series) -> str:
    """mean +- sample standard deviation of the full runs; the mean alone for one run."""
    mean = number(row["mean_percent"], 2)
    return mean if pd.isna(row["sd_percent"]) else f"{mean} ± {number(row['sd_percent'], 2)}"


def time(row: pd.Series) -> str:
    """Return the mean training time if all runs had one kind of device, else the shortest and the longest.

    If a run shared its device with others, the cell says with how many runs at most.
    """
    if not pd.isna(row["devices"]) and ";" in row["devices"]:
        text = spread(duration(row["seconds_least"]), duration(row["seconds_most"]))
    else:
        text = duration(row["seconds_mean"])
    return text + sharing(row["shared_by"])


def sharing(runs: float) -> str:
    """Return what is added to a training time that was measured while ``runs`` runs trained on the device."""
    return f" (shared by {runs:.0f})" if runs > 1 else ""


def run_time(rows: pd.DataFrame) -> list[str]:
    """Return the training time of each run, and how many runs shared its device, unless it was alone."""
    pairs = zip(rows["train_seconds"], rows["shared_by"], strict=True)
    return [duration(seconds) + sharing(runs) for seconds, runs in pairs]


def results(table: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """The main table of one data set: a row a model."""
    rows = table.loc[dataset].reset_index()
    columns = {
        ("", "model"): rows["model"].map(LABELS),
        (TENSORFLOW, "accuracy %"): rows["tensorflow_accuracy_percent"].map(lambda value: number(value, 2)),
        (TENSORFLOW, "time"): (60 * rows["tensorflow_minutes"]).map(duration),
        (PYTORCH, "accuracy %"): rows["pytorch_accuracy_percent"].map(lambda value: number(value, 2)),
        (PYTORCH, "time"): (60 * rows["pytorch_minutes"]).map(duration),
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
    """The main table for a narrow screen: by model, a row a source and a column a data set."""
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
    """The memory table, in MiB."""
    rows = table.reset_index()
    published, ours = "published (PyTorch)", "this project"
    ratio = rows["most_mib"] / rows["published_activations_mib"]
    columns = {
        ("", "model"): rows["model"].map(LABELS),
        (published, "parameters MiB"): rows["published_parameters_mib"].map(lambda value: number(value, 1)),
        (published, "activations MiB"): rows["published_activations_mib"].map(lambda value: number(value, 1)),
        (ours, "parameters MiB"): rows["parameters_mib"].map(lambda value: number(value, 1)),
        (ours, "activations MiB"): [
            spread(number(row["least_mib"], 1), number(row["most_mib"], 1)) for _, row in rows.iterrows()
        ],
        (ours, "of published"): [DASH if pd.isna(value) else f"{value:.0%}".replace("%", " %") for value in ratio],
        (ours, "records"): rows["records"].map(str),
        (ours, "device"): rows["devices"].fillna(DASH),
    }
    return pd.DataFrame(columns)


def full_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs behind the main table, a row each."""
    rows = runs[runs["full"]]
    return _flat(
        {
            **_who(rows),
            "accuracy %": rows["accuracy_percent"].map(lambda value: number(value, 2)),
            "time": run_time(rows),
            "interruptions": rows["interruptions"].map(str),
            "activations MiB": (rows["activation_bytes"] / 2**20).map(lambda value: number(value, 1)),
            "device": rows["device"],
            "execution": rows["execution"],
            "torch": rows["torch"],
            "commit": rows["commit"].replace("", DASH),
        }
    )


def other_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Every run that does not count, a row each, and what keeps it from counting."""
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
            "why it does not count": rows["why"],
        }
    )


def _who(rows: pd.DataFrame) -> dict:
    return {"model": rows["model"].map(LABELS), "data set": rows["dataset"].map(LABELS), "seed": rows["seed"].map(str)}


def _flat(columns: dict) -> pd.DataFrame:
    return pd.DataFrame({("", name): list(values) for name, values in columns.items()}, dtype=object)
