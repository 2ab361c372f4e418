"""Time and peak memory of training steps: plain, checkpointed, reversible; blocks, chains and whole networks.

    python -m bench --quick                     about two minutes on two cores
    python -m bench                             under ten
    python -m bench -k "depth8 and reversible"  only what the expression selects, as in pytest
    python -m bench.report FILE.json            tables and figures of the measurements, as Markdown and HTML
    python -m bench.gate BASE.json NOW.json     what became worse
    python -m bench.compare COMMIT_A COMMIT_B   two commits side by side

Writes the measurements of pytest-benchmark as JSON, prints a summary of them and, unless -k narrowed the run, writes
the report of figures and tables beside them.
"""

import argparse
import os
import sys
from datetime import datetime
from pathlib import Path

import pytest

from bench import report, summary

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases")
    parser.add_argument("--modes", action="store_true", help="bfloat16, channels_last, torch.compile on the CPU, too")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU (default: %(default)s; several "
                        "make small kernels a hundred times slower on a machine that is busy)")
    parser.add_argument("--clock", choices=["wall", "cpu"], help="cpu: seconds of this process alone, for a CPU shared "
                        "with others; with --threads 1 (default: wall)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("-k", metavar="EXPRESSION", help="run only the cases that match, as in pytest")
    parser.add_argument("--out", type=Path, default=Path("results/bench"), help="folder of the JSON (%(default)s)")
    args = parser.parse_args()

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop
    args.out.mkdir(parents=True, exist_ok=True)
    result = args.out / f"{datetime.now():%Y%m%d-%H%M%S}.json"
    options = [f"--benchmark-json={result}", "--benchmark-quiet", "--verbose", "-p", "no:cacheprovider"]
    options += ["-W", "default"]  # in a test a warning is an error; it does not end a measurement
    options += [f"--{name}" for name in ("quick", "modes") if getattr(args, name)]
    options += [f"--{name}={value}" for name in ("device", "threads", "clock") if (value := getattr(args, name))]
    if args.k:
        options += ["-k", args.k]
    status = pytest.main([*options, str(HERE)])
    if result.is_file() and result.stat().st_size:
        results = summary.load(result)
        print(summary.render(results))
        print(f"\nmeasurements: {result}")
        if not args.k:
            *_, page, _ = report.write(results, result.with_suffix(""), f"python -m bench.report {result}")
            print(f"tables and figures: {page}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
