"""The command line of ``bench.memory``."""

import argparse
import re
from collections.abc import Iterable

from memcnn import cli

MIB = 2**20
UNITS = {
    "": 1,
    "B": 1,
    **{f"{k}iB": 2 ** (10 * i) for i, k in enumerate("KMGT", 1)},
    **{f"{k}B": 1000**i for i, k in enumerate("KMGT", 1)},
}


def size(text: str) -> int:
    """Return the bytes in "24GiB", "512 MiB" or "80GB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    scale = {unit.lower(): factor for unit, factor in UNITS.items()}.get(match[2].lower()) if match else None
    if scale is None:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a size like 24GiB, 512MiB or 80GB")
    return int(float(match[1]) * scale)


def build_parser(text: str, *, optimizers: Iterable[str], dtypes: Iterable[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line, with ``text`` as its description."""
    parser = cli.parser_from("bench.memory", text, whole=True)
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="one of the six networks, or package.module:factory")
    add("--batch", type=cli.count, metavar="N", help="samples a step (default: 100, or as in --shape)")
    add("--shape", type=cli.shape, metavar="N,C,H,W", help="input shape of a model of your own")
    add("--classes", type=cli.count, default=10, metavar="N", help="classes of the six networks (default: %(default)s)")
    add("--dtype", choices=dtypes, default="float32", help="bfloat16: under autocast, as in training")
    add("--disable", action="store_true", help="run the reversible units by ordinary autograd")
    add("--optimizer", choices=optimizers, default="sgd", help="sgd has momentum (default: %(default)s)")
    add(
        "--device-memory",
        type=size,
        metavar="SIZE",
        help="search the largest batch and depth for a device of this size, like 24GiB",
    )
    add("--reserve", type=size, default=MIB << 10, metavar="SIZE", help="memory to keep free for uncounted bytes "
        "(default: 1GiB)")  # fmt: skip
    add(
        "--most-units",
        type=cli.count,
        default=64,
        metavar="N",
        help="largest number of units a stage to try (%(default)s)",
    )
    add("--no-check", action="store_true", help="do not compute a step to measure the prediction's error")
    add("--json", type=cli.output_file, metavar="FILE", help="write all numbers to this file, in bytes")
    add("--table", action="store_true", help="recompute the published table of activations")
    add("--out", type=cli.output_file, metavar="FILE", help="write the table to this file as well")
    return parser
