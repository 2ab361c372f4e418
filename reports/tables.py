"""Published numbers and run records as pandas tables of plain numbers; what is not known is missing, never zero."""
from dataclasses import fields
from pathlib import Path

import pandas as pd

from memcnn.models.resnet import MODELS
from memcnn.training.recipe import PUBLISHED, RECIPES, Recipe
from memcnn.training.record import DATASETS, RunRecord
from memcnn.training.text import clean
from reports.verdict import half_width, verdict

MIB = 2**20

RUN_COLUMNS = (
    "folder", "model", "dataset", "seed", "recipe", "batch_size", "iterations", "planned", "accuracy_percent",
    "accuracy_iteration", "train_seconds", "interruptions", "parameter_bytes", "peak_bytes", "activation_bytes",
    "engine", "data", "device", "execution", "mixed", "shared_by", "torch", "commit", "full", "why",
)  # fmt: skip


def published() -> pd.DataFrame:
    """reports/published.csv, with `minutes` from h:mm: a row a (model, dataset, implementation), and a row a model for
    its memory, without data set."""
    table = pd.read_csv(Path(__file__).with_name("published.csv"))
    clock = table["time_h_mm"].str.split(":", expand=True).astype(float)
    return table.assign(minutes=60 * clock[0] + clock[1])


def why_not_full(record: RunRecord) -> list[str]:
    """What keeps a run out of the main table, in words; empty exactly for the runs where `record.is_full`."""
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
    """One row a run (its folder, its record), columns `RUN_COLUMNS`: `full` tells whether it counts in the main table,
    and `why` why not.

    A run that lies in two places, word for word, is taken once. Of several full runs of one model, data set and seed
    only the first given counts, so that n is the number of independent runs; the choice never looks at the accuracy.
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
    """The main table, one row a (dataset, model): published values, and this project's full runs beside them.

    Columns: `tensorflow_accuracy_percent`, `tensorflow_minutes`, `pytorch_...` likewise, `n`, `mean_percent`,
    `sd_percent` (of the sample; missing below two runs), `low_percent` and `high_percent` (95 % prediction interval;
    missing below three), `seconds_mean`, `seconds_least`, `seconds_most`, `devices`, `shared_by` (largest number of
    runs that trained on a run's device at the same time), `difference_points` (mean less published PyTorch), `verdict`.
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


def memory_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Memory of one training step at batch 100, one row a model, published against measured, in MiB.

    Measured: every record at batch 100 with the engine on counts, whatever its length or data, for neither changes
    the shapes. Columns: `published_parameters_mib`, `published_activations_mib`, `parameters_mib`, `least_mib` and
    `most_mib` (activations), `records`, `devices`.
    """
    values = published().dropna(subset="activations_mib").set_index("model")
    table = values[["parameters_mib", "activations_mib"]].add_prefix("published_").reindex(list(MODELS))
    measured = runs[(runs["batch_size"] == 100) & runs["engine"]]
    summary = measured.groupby("model").agg(
        parameters_mib=("parameter_bytes", "max"),
        least_mib=("activation_bytes", "min"),
        most_mib=("activation_bytes", "max"),
        records=("model", "size"),
        devices=("device", lambda names: "; ".join(sorted(set(names)))),
    )
    sizes = ["parameters_mib", "least_mib", "most_mib"]
    summary[sizes] = summary[sizes].astype(float) / MIB
    table = table.join(summary)
    table["records"] = table["records"].fillna(0).astype(int)
    return table


def _row(folder: Path, record: RunRecord, reasons: list[str]) -> tuple:
    device, software = record.device, record.software
    unit = f"{device['count']} x " if device["count"] > 1 else ""
    threads = ""
    if device["type"] == "cpu":
        threads = f" ({device['threads']} thread{'' if device['threads'] == 1 else 's'})"
    commit = "" if record.commit is None else record.commit[:10] + ("" if record.clean else " with local changes")
    device = f"{unit}{device['name']}{threads}"
    return (
        str(folder), record.model, record.dataset, record.seed, record.recipe.name, record.recipe.batch_size,
        record.iterations, record.recipe.iterations, record.test_accuracy, record.test_iteration, record.train_seconds,
        record.interruptions, record.parameter_bytes, record.peak_bytes, record.activation_bytes, record.engine,
        record.data_kind, clean(device), clean(_executions(record)), record.mixed, record.shared_by,
        clean(software["torch"]), clean(commit), not reasons, clean("; ".join(reasons)),
    )  # fmt: skip


def _parts(record: RunRecord) -> str:
    """List how the parts of a mixed run were executed, as "bf16 on cuda to iteration 400, float32 on cpu to 1000"."""
    parts: list[tuple[str, int]] = []
    for segment in record.segments:
        how = f"{segment.execution} on {segment.device['type']}"
        if parts and parts[-1][0] == how:
            parts.pop()
        if segment.iterations:
            parts.append((how, segment.last))
    return "; ".join(f"{how} to iteration {last:,}" for how, last in parts)


def _executions(record: RunRecord) -> str:
    """List the executions of a run's parts, each once, in the order of their first use."""
    return "; ".join(dict.fromkeys(part.execution for part in record.segments if part.iterations))


def _recipe(recipe: Recipe) -> str:
    """How a recipe departs from the published one."""
    if recipe in RECIPES.values():
        return f"{recipe.name} recipe: {recipe.iterations} iterations of {recipe.batch_size} images"
    changed = [f.name for f in fields(Recipe) if getattr(recipe, f.name) != getattr(PUBLISHED, f.name)]
    told = [name for name in changed if name != "name"] or changed
    values = [f"{name} {_plain(getattr(recipe, name))} not {_plain(getattr(PUBLISHED, name))}" for name in told]
    return "another recipe: " + ", ".join(values)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return "/".join(map(str, value)) or "none"
    return "all" if value is None else str(value)
