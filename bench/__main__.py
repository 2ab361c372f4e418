"""Time and peak memory of plain, checkpointed and reversible chains.

    python -m bench --quick                    depth up to 16, batch 8: about two minutes on two cores
    python -m bench                            depth up to 64, batch 32: about ten
    python -m bench -k "depth8 and reversible" only what the expression selects

Writes the measurements of pytest-benchmark as JSON and prints a summary of them. The number of threads is torch's:
set OMP_NUM_THREADS to change it.
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

import pytest

from bench import summary

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="smaller batch, depth up to 16")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the cases that match, as in pytest")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the JSON (%(default)s)")
    args = parser.parse_args()

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / f"{datetime.now():%Y%m%d-%H%M%S}.json"
    options = [f"--benchmark-json={result}", "--benchmark-quiet", "--verbose", "-p", "no:cacheprovider"]
    if args.quick:
        options.append("--quick")
    if args.device:
        options.append(f"--device={args.device}")
    if args.k:
        options += ["-k", args.k]
    status = pytest.main([*options, str(HERE)])
    if result.is_file() and result.stat().st_size:
        print(summary.render(summary.load(result)))
        print(f"\nmeasurements: {result}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
