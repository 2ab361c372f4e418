"""What `python -m bench.memory` reads and prints."""

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

MIB = 2**20
UNITS = {"": 1, "B": 1, **{f"{k}iB": 2 ** (10 * i) for i, k in enumerate("KMGT", 1)},
         **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)}}  # fmt: skip
PARTS = {
    "parameter_bytes": "parameters",
    "gradient_bytes": "gradients",
    "optimizer_bytes": "optimiser state",
    "buffer_bytes": "buffers",
    "batch_bytes": "batch",
    "activation_bytes": "activations",
}
PHASES = {"forward": "forward pass", "backward": "backward pass", "update": "update"}


def size(text: str) -> int:
    """Bytes from "24GiB", "512 MiB", "80GB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    scale = {unit.lower(): factor for unit, factor in UNITS.items()}.get(match[2].lower()) if match else None
    if scale is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a size like 24GiB, 512MiB or 80GB")
    return int(float(match[1]) * scale)


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of at least 1")
    return int(text)


def shape(text: str) -> tuple[int, ...]:
    """(100, 3, 32, 32) from "100,3,32,32"."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted whole numbers, the batch first, like 100,3,32,32")
    return tuple(int(word) for word in words)


def file(text: str) -> Path:
    """A file that can be written: its folder is there."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a file in a folder that exists")
    return path


def build_parser(text: str, *, optimizers: Iterable[str], dtypes: Iterable[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.memory", description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="one of the six networks, or package.module:factory")
    add("--batch", type=count, metavar="N", help="samples of a step (default: 100, or as in --shape)")
    add("--shape", type=shape, metavar="N,C,H,W", help="of the input of a model of yours")
    add("--classes", type=count, default=10, metavar="N", help="of the six networks (default: %(default)s)")
    add("--dtype", choices=dtypes, default="float32", help="bfloat16: under autocast, as in training")
    add("--disable", action="store_true", help="run the reversible units by ordinary autograd")
    add("--optimizer", choices=optimizers, default="sgd", help="sgd has momentum (default: %(default)s)")
    add("--device-memory", type=size, metavar="SIZE", help="of the device, like 24GiB: find what fits")
    add("--reserve", type=size, default=MIB << 10, metavar="SIZE", help="of it, for what is not counted (1GiB)")
    add("--most-units", type=count, default=64, metavar="N", help="units a stage to search up to (%(default)s)")
    add("--no-check", action="store_true", help="do not compute a step to measure the prediction's error")
    add("--json", type=file, metavar="FILE", help="write all numbers there, in bytes")
    add("--table", action="store_true", help="the published table of activations, recomputed")
    add("--out", type=file, metavar="FILE", help="write the table there, too")
    return parser


def render(result: dict) -> str:
    """The report of one model."""
    peak = result["peak"]
    how = f"{result['dtype']}{' autocast' if result['dtype'] != 'float32' else ''}, optimiser {result['optimizer']}"
    engine = ", reversible units off" if result["disable"] else ""
    lines = [
        f"{result['model']}, input {' x '.join(map(str, result['shape']))}, {how}{engine}",
        "One training step on CUDA at its worst instant, predicted",
        "",
        *(f"{name:<16}{mib(peak[key]):>14}" for key, name in PARTS.items()),
        f"{'peak':<16}{mib(peak['peak_bytes']):>14}  in the {PHASES[peak['phase']]}",
    ]
    if result["check"]:
        lines += ["", "The prediction's error, on steps that were computed"]
        lines += [_check(row) for row in result["check"]]
    if not any(row["device"] == "cuda" for row in result["check"]):
        why = "there is no CUDA device: run this where torch.cuda.is_available()" if result["check"] else "--no-check"
        lines += [f"on CUDA: not measured, {why}"]
    if result["budget_bytes"] is not None:
        budget, reserve = mib(result["budget_bytes"]), mib(result["reserve_bytes"])
        lines += ["", f"Within {budget}, {reserve} being reserved for context, kernels' scratch and fragmentation"]
        lines += [_fit(result["largest_batch"], "batch", "")]
        if result["largest_depth"] is not None:
            depth = result["largest_depth"]
            name = f" ({depth['layers'] * depth['largest'] + 2} layers)" if depth["largest"] else ""
            lines += [_fit(depth, "depth", f" units a stage{name} at batch {result['shape'][0]}")]
    return "\n".join(lines)


def _check(row: dict) -> str:
    error = (row["predicted_bytes"] - row["tensor_bytes"]) / row["tensor_bytes"]
    scratch = (row["predicted_bytes"] - row["allocated_bytes"]) / row["allocated_bytes"]
    reserved = "" if row["reserved_bytes"] is None else f", {mib(row['reserved_bytes'])} reserved"
    return (
        f"on {row['device']}, batch {row['batch']}: predicted {mib(row['predicted_bytes'])}, measured "
        f"{mib(row['tensor_bytes'])} of tensors (error {error:+.3%}), {mib(row['allocated_bytes'])} by the allocator, "
        f"kernels' scratch included ({scratch:+.1%}){reserved}"
    )


def _fit(found: dict, what: str, of: str) -> str:
    if found["largest"] == 0:
        return f"largest {what}: none, {mib(found['next_peak_bytes'])} for 1{of}"
    text = f"largest {what}: {found['largest']:,}{of}, {mib(found['peak_bytes'])}"
    if found["next_peak_bytes"] is None:
        return f"{text}; the search ended there, more may fit{': see --most-units' if what == 'depth' else ''}"
    return f"{text}; one more needs {mib(found['next_peak_bytes'])}"


def mib(size_bytes: int) -> str:
    return f"{size_bytes / MIB:,.1f} MiB" if size_bytes >= MIB else f"{size_bytes / 1024:,.1f} KiB"
