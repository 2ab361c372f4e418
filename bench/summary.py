"""Tables of a benchmark result: `python -m bench.summary results/bench/FILE.json`."""

import json
import sys
from pathlib import Path

import pandas as pd

MIB = 2**20


def load(path: Path) -> pd.DataFrame:
    """One row per benchmark: its group ("time" or "memory"), `median_s`, `rounds`, and what is in its `extra_info`.

    `subject` is ordered as the subjects ran.
    """
    benchmarks = json.loads(Path(path).read_text("utf-8"))["benchmarks"]
    results = pd.DataFrame(
        {"group": b["group"], "median_s": b["stats"]["median"], "rounds": b["stats"]["rounds"], **b["extra_info"]}
        for b in benchmarks
    )
    results["subject"] = pd.Categorical(results.subject, results.subject.unique(), ordered=True)
    return results


def time_table(results: pd.DataFrame) -> pd.DataFrame:
    """Per depth and subject: median milliseconds, and the ratio to plain as its median and range over the repeats.

    A ratio is taken within one repeat, whose subjects ran one right after the other; it is nan where plain did not run.
    """
    times = results[results.group == "time"].copy()
    plain = times[times.subject == "plain"].set_index(["depth", "repeat"]).median_s
    times["ratio"] = times.median_s / plain.reindex(pd.MultiIndex.from_frame(times[["depth", "repeat"]])).array
    groups = times.groupby(["depth", "subject"], observed=True)
    return pd.DataFrame(
        {
            "median ms": groups.median_s.median() * 1e3,
            "repeats": groups.size(),
            "ratio to plain": groups.ratio.median(),
            "lowest": groups.ratio.min(),
            "highest": groups.ratio.max(),
        }
    )


def memory_table(results: pd.DataFrame, column: str = "activation_bytes") -> pd.DataFrame:
    """MiB per subject (rows) and depth (columns)."""
    return results[results.group == "memory"].pivot(index="subject", columns="depth", values=column) / MIB


def render(results: pd.DataFrame) -> str:
    """All tables as text, with the environment in which they were measured."""
    first = results.iloc[0]
    software = first.software
    changes = "" if first.clean in (True, None) else " with uncommitted changes"
    lines = [
        f"{first.device['name']} ({first.device['type']}, {first.device['threads']} threads), "
        f"torch {software['torch']}, Python {software['python']}, memcnn {software['memcnn']}, "
        f"commit {(first.commit or 'unknown')[:12]}{changes}",
        "One forward and backward pass through a chain of coupling blocks: "
        f"float32, batch {first.batch}, {first.channels} channels of {first.side} x {first.side}",
    ]
    if (results.group == "time").any():
        rounds = results[results.group == "time"].rounds.max()
        table = time_table(results)
        lines += [
            "",
            f"Time (each repeat is the median of {rounds} rounds; medians and range are over the repeats)",
            table.reset_index().to_markdown(index=False, floatfmt=("", "", ".1f", "", ".2f", ".2f", ".2f")),
        ]
    if (results.group == "memory").any():
        lines += [
            "",
            "Memory against depth: MiB above parameters, gradients and input at the worst instant, by the allocator",
            memory_table(results).to_markdown(floatfmt=".1f"),
            "",
            "The same without what kernels borrow: tensors alone, equal on every machine",
            memory_table(results, "tensor_activation_bytes").to_markdown(floatfmt=".1f"),
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(render(load(Path(sys.argv[1]))))
