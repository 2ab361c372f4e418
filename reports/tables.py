"""Published numbers and run records as pandas tables of numbers. An unknown number is missing, never zero."""

from dataclasses import fields
from pathlib import Path

import pandas as pd

from memcnn.models.resnet import MODELS
from memcnn.training.recipe import PUBLISHED, RECIPES, Recipe
from memcnn.training.record import DATASETS, RunRecord
from memcnn.training.text import clean
from reports.verdict import half_width, verdict

MIB = 2**20
BATCH = 100  # of the published memory table
MEASUREMENTS = Path(__file__).with_name("bench")  # a folder for each device
MEMORY_FILE = "memory.csv"
SPEED_FILE = "speed.csv"
GPU_PRECISIONS = ("float32", "bf16")
GPU_COLUMNS = ("model", "precision", "activation_bytes", "device")
MEASURED_COLUMNS = (*GPU_COLUMNS, "held_bytes")

RUN_COLUMNS = (
    "folder", "model", "dataset", "seed", "recipe", "batch_size", "iterations", "planned", "accuracy_percent",
    "accuracy_iteration", "train_seconds", "interruptions", "parameter_bytes", "peak_bytes", "activation_bytes",
    "engine", "data", "device_type", "device", "execution", "mixed", "shared_by", "torch", "commit", "full", "why",
)  # fmt: skip


def published() -> pd.DataFrame:
    """Read reports/published.csv, and add the column ``minutes``.

    There is a row for each (model, dataset, implementation), and a row without data set for the memory of each model.
    """
    table = pd.read_csv(Path(__file__).with_name("published.csv"))
    clock = table["time_h_mm"].str.split(":", expand=True).astype(float)
    return table.assign(minutes=60 * clock[0] + clock[1])


def why_not_full(record: RunRecord) -> list[str]:
    """Return the reasons that keep a run out of the main table. Empty if and only if ``record.is_comparable``."""
    reasons = []
    if record.status != "complete":
        reason = "still running, or killed" if record.reason is None else record.reason
        reasons.append(f"{record.status}: {reason}")
    if not record.data["official"]:
        reasons.append(f"data: {record.data_kind}")
    if not record.engine:
        reasons.append("reversible engine off")
    if record.recipe != PUBLISHED:
        reasons.append(_recipe(record.recipe))
    if record.mixed:
        reasons.append(f"mixed execution: {_parts(record)}")
    if record.splits_batch_norm:
        reasons.append(f"BatchNorm over {record.recipe.batch_size // record.device['count']} images")
    return reasons


def runs_table(records: list[tuple[Path, RunRecord]]) -> pd.DataFrame:
    """Return one row for each run, with the columns ``RUN_COLUMNS``.

    ``full`` says whether the run counts in the main table, ``why`` explains why it does not. The same run in two places
    gets one row. When several full runs share model, data set and seed, only the first one counts, so that n is the
    number of independent runs; the accuracy plays no part in that choice.

    Args:
        records: pairs of a run's folder and its record.
    """
    rows, seen, counted = [], [], {}
    for folder, record in records:
        if (folder.name, record) in seen:
            continue
        seen.append((folder.name, record))
        reasons = why_not_full(record)
        if not reasons:
            counts = counted.setdefault((record.model, record.dataset, record.seed), folder)
            if counts != folder:
                reasons = [f"seed {record.seed} counts already, from {counts}"]
        rows.append(_row(folder, record, reasons))
    types = {"accuracy_iteration": "Int64", "full": bool, "engine": bool, "mixed": bool, "shared_by": int}
    table = pd.DataFrame(rows, columns=RUN_COLUMNS).astype(types)
    rank = {name: place for place, name in enumerate((*DATASETS, *MODELS))}
    return table.sort_values(
        ["dataset", "model", "recipe", "seed", "folder"],
        key=lambda column: column.map(rank) if column.name in ("dataset", "model") else column,
        ignore_index=True,
    )


def results_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the main table: published values beside this project's full runs.

    One row for each (dataset, model). Columns: ``tensorflow_accuracy_percent``, ``tensorflow_minutes``, the same two
    for ``pytorch``, ``n``, ``mean_percent``, ``sd_percent`` (of the sample; missing below two runs), ``low_percent``,
    ``high_percent`` (95 % prediction interval; missing below three runs), ``seconds_mean``, ``seconds_least``,
    ``seconds_most``, ``devices``, ``shared_by`` (largest number of runs that trained on a run's device at the same
    time), ``difference_points`` (mean minus the published PyTorch value), ``verdict``.
    """
    values = published().dropna(subset="accuracy_percent").set_index(["dataset", "model", "implementation"])
    table = values[["accuracy_percent", "minutes"]].unstack()
    table.columns = [f"{implementation.lower()}_{value}" for value, implementation in table.columns]
    table = table.reindex(pd.MultiIndex.from_product([DATASETS, MODELS], names=["dataset", "model"]))
    full = runs[runs["full"]].groupby(["dataset", "model"])
    table = table.join(
        full.agg(
            n=("seed", "size"),
            mean_percent=("accuracy_percent", "mean"),
            sd_percent=("accuracy_percent", "std"),
            seconds_mean=("train_seconds", "mean"),
            seconds_least=("train_seconds", "min"),
            seconds_most=("train_seconds", "max"),
            devices=("device", lambda names: "; ".join(sorted(set(names)))),
            shared_by=("shared_by", "max"),
        )
    )
    table["n"] = table["n"].fillna(0).astype(int)
    half = [half_width(n, sd) for n, sd in zip(table["n"], table["sd_percent"], strict=True)]
    table["low_percent"] = table["mean_percent"] - half
    table["high_percent"] = table["mean_percent"] + half
    table["difference_points"] = table["mean_percent"] - table["pytorch_accuracy_percent"]
    cells = zip(table["n"], table["mean_percent"], table["sd_percent"], table["pytorch_accuracy_percent"], strict=True)
    table["verdict"] = [verdict(*cell) for cell in cells]
    return table


def memory_table(runs: pd.DataFrame, measured: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return the memory of one training step at batch 100, one row for each model, in MiB.

    A record counts when its batch is 100 and its engine was on, whatever its length and data, because neither changes
    the shapes. Records of a CPU count the tensors, in float32. Records of a GPU, and ``measured``, count the bytes
    that the allocator gave out, with the kernels' workspaces; each precision has its own columns, because in bf16 most
    activations take half the bytes.

    Args:
        runs: the table of ``runs_table``.
        measured: the table of ``gpu_measurements``.

    Returns:
        Columns ``published_parameters_mib``, ``published_activations_mib``, ``parameters_mib``, ``least_mib``,
        ``most_mib`` and ``records`` (tensors), ``gpu_float32_least_mib``, ``gpu_float32_most_mib``, the same two for
        ``bf16``, and ``gpu_devices``.
    """
    values = published().dropna(subset="activations_mib").set_index("model")
    table = values[["parameters_mib", "activations_mib"]].add_prefix("published_").reindex(list(MODELS))
    counted = runs[(runs["batch_size"] == BATCH) & runs["engine"]]
    counted = counted.assign(precision=counted["execution"].map(_precision))
    of_tensors = counted[(counted["device_type"] == "cpu") & (counted["precision"] == "float32")].groupby("model")
    table["parameters_mib"] = counted.groupby("model")["parameter_bytes"].max()
    table = table.join(
        of_tensors.agg(
            least_mib=("activation_bytes", "min"),
            most_mib=("activation_bytes", "max"),
            records=("model", "size"),
        )
    )
    table["records"] = table["records"].fillna(0).astype(int)
    on_gpu = counted[counted["device_type"] == "cuda"][list(GPU_COLUMNS)]
    if measured is not None:
        on_gpu = pd.concat([frame for frame in (on_gpu, measured[list(GPU_COLUMNS)]) if not frame.empty] or [on_gpu])
    for precision in GPU_PRECISIONS:
        groups = on_gpu[on_gpu["precision"] == precision].groupby("model")["activation_bytes"]
        table[f"gpu_{precision}_least_mib"], table[f"gpu_{precision}_most_mib"] = groups.min(), groups.max()
    table["gpu_devices"] = on_gpu.groupby("model")["device"].agg(lambda names: "; ".join(sorted(set(names))))
    sizes = [name for name in table if name.endswith("_mib") and not name.startswith("published")]
    table[sizes] = table[sizes].astype(float) / MIB
    return table


def gpu_measurements(folder: str | Path = MEASUREMENTS) -> tuple[pd.DataFrame, list[str]]:
    """Read every ``<device>/memory.csv`` that ``python -m bench.measured_memory`` wrote on a GPU.

    Args:
        folder: holds a folder for each device.

    Returns:
        The rows with the engine on, columns ``MEASURED_COLUMNS``; and a line for each file that cannot be used.
    """
    frames, problems = [], []
    for path in sorted(Path(folder).glob(f"*/{MEMORY_FILE}")):
        try:
            frame = pd.read_csv(path)
            if missing := {*MEASURED_COLUMNS, "device_type", "batch", "engine"} - set(frame):
                raise ValueError(f"missing columns {', '.join(sorted(missing))}")
            if unknown := set(frame["model"]) - set(MODELS):
                raise ValueError(f"unknown models {', '.join(map(str, unknown))}")
            for name in ("activation_bytes", "held_bytes"):
                if not (pd.api.types.is_numeric_dtype(frame[name]) and (frame[name] > 0).all()):
                    raise ValueError(f"{name}: wanted numbers above 0")
        except (OSError, ValueError) as error:
            problems.append(f"{path}: {error}")
            continue
        frame = frame[(frame["device_type"] == "cuda") & (frame["batch"] == BATCH) & frame["engine"].astype(bool)]
        frames.append(frame[list(MEASURED_COLUMNS)].assign(device=frame["device"].map(lambda name: clean(str(name)))))
    return pd.concat(frames) if frames else pd.DataFrame(columns=list(MEASURED_COLUMNS)), problems


def step_times(runs: pd.DataFrame, folder: str | Path = MEASUREMENTS) -> tuple[pd.DataFrame, list[str]]:
    """Return the time of a training step at batch 100, for each device and model.

    It is the smallest time that ``python -m bench.speed`` or a full run measured. Full runs that shared their device
    do not count.

    Args:
        runs: see ``runs_table``.
        folder: holds a folder for each device.

    Returns:
        The columns ``device``, ``model`` and ``seconds``; and a line for each file that cannot be used.
    """
    alone = runs[runs["full"] & (runs["shared_by"] == 1)]
    frames, problems = [alone.assign(seconds=alone["train_seconds"] / alone["iterations"])], []
    for path in sorted(Path(folder).glob(f"*/{SPEED_FILE}")):
        try:
            table = pd.read_csv(path)
            table = table[(table["batch"] == BATCH) & (table["group"] == 1) & table["network"].isin(MODELS)]
            devices = [
                clean(f"{name} ({threads} thread{'' if threads == 1 else 's'})" if kind == "cpu" else str(name))
                for name, threads, kind in zip(table["device"], table["threads"], table["device_type"], strict=True)
            ]
            frames.append(table.assign(model=table["network"], device=devices, seconds=table["ms"].astype(float) / 1e3))
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{path}: {error}")
    columns = ["device", "model", "seconds"]
    found = pd.concat([frame[columns] for frame in frames if not frame.empty] or [frames[0][columns]])
    return found.groupby(["device", "model"], as_index=False)["seconds"].min(), problems


def _precision(execution: str) -> str:
    """Return the tensors' precision, "bf16" or "float32". Tensors of tf32 and of an unnamed execution are float32."""
    return "bf16" if execution.split(",")[0] == "bf16" else "float32"


def _as_text(path: Path) -> str:
    """Return the path with "?" for bytes that are no text, because Arrow's string columns refuse them."""
    return str(path).encode("utf-8", "replace").decode("utf-8")


def _row(folder: Path, record: RunRecord, reasons: list[str]) -> tuple:
    device, software = record.device, record.software
    unit = f"{device['count']} x " if device["count"] > 1 else ""
    threads = ""
    if device["type"] == "cpu":
        threads = f" ({device['threads']} thread{'' if device['threads'] == 1 else 's'})"
    commit = "" if record.commit is None else record.commit[:10] + ("" if record.clean else " with local changes")
    name = f"{unit}{device['name']}{threads}"
    return (
        _as_text(folder), record.model, record.dataset, record.seed, record.recipe.name, record.recipe.batch_size,
        record.iterations, record.recipe.iterations, record.test_accuracy, record.test_iteration, record.train_seconds,
        record.interruptions, record.parameter_bytes, record.peak_bytes, record.activation_bytes, record.engine,
        record.data_kind, clean(device["type"]), clean(name), clean(_executions(record)), record.mixed,
        record.shared_by, clean(software["torch"]), clean(commit), not reasons, clean("; ".join(reasons)),
    )  # fmt: skip


def _parts(record: RunRecord) -> str:
    """Describe the parts of a mixed run: "bf16 on cuda to iteration 400; float32 on cpu to iteration 1,000"."""
    parts: list[tuple[str, int]] = []
    for segment in (segment for segment in record.segments if segment.iterations):
        how = f"{segment.execution} on {segment.device['type']}"
        if parts and parts[-1][0] == how:
            parts.pop()
        parts.append((how, segment.last))
    return "; ".join(f"{how} to iteration {last:,}" for how, last in parts)


def _executions(record: RunRecord) -> str:
    """Return the distinct executions of a run's parts, in the order of their first use."""
    return "; ".join(dict.fromkeys(part.execution for part in record.segments if part.iterations))


def _recipe(recipe: Recipe) -> str:
    """Describe how a recipe differs from the published one."""
    if recipe in RECIPES.values():
        return f"{recipe.name} recipe: {recipe.iterations} iterations of {recipe.batch_size} images"
    changed = [f.name for f in fields(Recipe) if getattr(recipe, f.name) != getattr(PUBLISHED, f.name)]
    shown = [name for name in changed if name != "name"] or changed
    values = [f"{name} {_plain(getattr(recipe, name))} not {_plain(getattr(PUBLISHED, name))}" for name in shown]
    return "another recipe: " + ", ".join(values)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value)) or "none"
    return "all" if value is None else str(value)
