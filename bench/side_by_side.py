"""Write one page with the measurements of all devices, in a group of columns for each device.

    python -m bench.side_by_side      reads reports/bench/*/, writes reports/bench/README.md and a page of it

A dash stands for a case that was not measured on a device. The HTML page goes to reports/out/bench, which git ignores.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from bench import folders, result, summary
from bench.result import spread
from bench.speed import text as speed_text
from memcnn import cli
from memcnn.training.files import write_by_rename
from memcnn.training.text import clean
from reports import page
from reports.cells import DASH
from reports.page import Page, Section
from reports.tables import MEMORY_FILE

TITLE = "What reversibility costs and saves, by device"
COMMAND = "python -m bench.side_by_side"


@dataclass(frozen=True)
class Device:
    """The measurements in one device's folder; a table is empty if its kind of measurement is missing."""

    name: str
    origin: str
    suites: pd.DataFrame
    speed: pd.DataFrame
    memory: pd.DataFrame


def load(folder: Path) -> Device | None:
    """Read a device's folder; return None if it holds no measurement.

    Raises:
        ValueError: if a file in it cannot be used.
    """
    suites, speed, memory, origin = pd.DataFrame(), speed_text.read(folder), pd.DataFrame(), ""
    environment = folders.read_environment(folder)
    if environment is not None and (folder / result.MEASUREMENTS).is_file():
        suites = result.load(folder)
        origin = f"chains and networks: {result.origin(suites)}"
    if (folder / MEMORY_FILE).is_file():
        memory = pd.read_csv(folder / MEMORY_FILE)
    if suites.empty and speed.empty and memory.empty:
        return None
    names = [environment["device"]["name"]] if environment else [*speed.get("device", []), *memory.get("device", [])]
    origins = [origin, *(f"speed of {line}" for line in speed_text.origins(speed))] if len(speed) else [origin]
    text = "; ".join(origin.rstrip(".") for origin in origins if origin)
    return Device(clean(str(names[0])), text, suites, speed, memory)


def sections(devices: Sequence[Device]) -> list[summary.Section]:
    """Return the tables in which at least one device has a column."""
    found = []
    for title, note, columns_of in (
        ("Chains of 16 blocks", CHAINS, chains),
        ("A training step of the networks, eager, float32", NETWORKS, networks),
        ("A training step as training executes it", SPEED, training),
        ("Memory of a training step, MiB", MEMORY, memory),
    ):
        tables = {device.name: columns_of(device) for device in devices}
        tables = {f"{name}: ": table for name, table in tables.items() if not table.empty}
        if tables:
            rows = list(dict.fromkeys(row for table in tables.values() for row in table.index))
            joined = pd.concat([table.reindex(rows).add_prefix(name) for name, table in tables.items()], axis=1)
            found.append((title, note, joined.fillna(DASH).reset_index(names="")))
    return found


CHAINS = (
    "Time of a step and peak activations, both relative to plain autograd on the same device; median [quartiles]. The "
    "batch is 4 on a CPU and 64 on a GPU."
)
NETWORKS = "Images a second, forward, backward and SGD; the batch is 8 on a CPU and 100 on a GPU."
SPEED = (
    "Batch 100, augmentation included; median. `python -m bench.speed` names the executions. “of N” is the time of a "
    "step when the steps of N runs are interleaved on N streams."
)
MEMORY = (
    "Batch 100. Peak: the highest total of a step, without model, gradients and batch. Held: after the forward pass."
)


def chains(device: Device) -> pd.DataFrame:
    """Return time and activations of chains of 16 blocks, relative to plain autograd."""
    if device.suites.empty:
        return pd.DataFrame()
    times = result.series_of(result.ratios(device.suites), "time", "depth")
    peaks = result.series_of(device.suites, "memory", "depth")
    times, peaks = times[times.depth == 16], peaks[peaks.depth == 16].set_index("subject").activation_bytes
    columns = {"time": times.groupby("subject").ratio.agg(spread)}
    if "plain" in peaks:
        columns["activations"] = (peaks / peaks["plain"]).map(lambda share: f"{100 * share:.1f} %")
    table = pd.DataFrame(columns)
    return table.reindex([name for name in result.NAMES if name in table.index]).rename(index=result.NAMES)


def networks(device: Device) -> pd.DataFrame:
    """Return the throughput of each network, and the time with the engine on relative to off."""
    if device.suites.empty:
        return pd.DataFrame()
    suites = device.suites
    table = summary.network_table(suites[suites.group == "memory"], result.ratios(suites))
    if table.empty or "images/s" not in table:
        return pd.DataFrame()
    return pd.DataFrame({"images/s": table["images/s"].map("{:,.1f}".format), "time, on / off": table["ratio"]})


def training(device: Device) -> pd.DataFrame:
    """Return the time of a training step in each execution."""
    rows = device.speed[device.speed["batch"] == 100]
    if rows.empty:
        return pd.DataFrame()
    together = [f" of {group}" if group > 1 else "" for group in rows["group"]]
    digits = 0 if rows["device_type"].iloc[0] == "cpu" else 2
    index = [f"{a}, {b}{c}" for a, b, c in zip(rows["network"], rows["execution"], together, strict=True)]
    columns = {
        "ms": [f"{value:,.{digits}f}" for value in rows["ms"]],
        "times the floor": [f"{value:.1f}" for value in rows["ms"] / rows["floor_ms"]],
    }
    return pd.DataFrame(columns, index=index)


def memory(device: Device) -> pd.DataFrame:
    """Return the memory of a training step, in MiB."""
    if device.memory.empty:
        return pd.DataFrame()
    rows = device.memory[device.memory["batch"] == 100]
    engines = ["" if name.startswith("resnet") else f", engine {'on' if on else 'off'}"
               for name, on in zip(rows["model"], rows["engine"], strict=True)]  # fmt: skip
    index = [f"{a}{b}, {c}" for a, b, c in zip(rows["model"], engines, rows["precision"], strict=True)]
    to_text: Callable[[float], str] = "{:,.1f}".format
    columns = {"peak": rows["activation_bytes"] / 2**20, "held": rows["held_bytes"] / 2**20}
    return pd.DataFrame({name: list(values.map(to_text)) for name, values in columns.items()}, index=index)


def page_of(devices: Sequence[Device]) -> Page:
    """Return the page of all devices."""
    return Page(
        TITLE,
        [Section(title, note=note, table=page.text_frame(table)) for title, note, table in sections(devices)],
        origin=[f"{device.name}: {device.origin}" for device in devices],
        commands=[COMMAND],
    )


@cli.command("bench.side_by_side")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page; return 0, 1 if a folder was left out, or 2 if there are no measurements."""
    parser = cli.parser_from("bench.side_by_side", __doc__, whole=True)
    parser.add_argument("--folder", type=Path, default=folders.MEASUREMENTS, help="holds a folder for each device")
    root = parser.parse_args(arguments).folder
    devices, status = [], 0
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        try:
            if (device := load(folder)) is not None:
                devices.append(device)
        except (OSError, ValueError, KeyError) as error:
            print(f"bench.side_by_side: {folder} is left out: {error}", file=sys.stderr)
            status = 1
    if not devices:
        print(f"bench.side_by_side: no measurements in {root}; make some: python -m bench", file=sys.stderr)
        return 2
    made, out = page_of(devices), folders.page_folder(root)
    out.mkdir(parents=True, exist_ok=True)
    for path, text in ((root / "README.md", page.markdown(made)), (out / "page.html", page.html(made))):
        write_by_rename(path, text.encode())
        print(path)
    return status


if __name__ == "__main__":
    sys.exit(main())
