"""Compare two commits: time in alternating rounds, memory and evaluations of F and G exactly.

    python -m bench.compare HEAD~3 HEAD
    python -m bench.compare main .                     "." is the working tree, with its uncommitted changes
    python -m bench.compare v1 v2 -k tiny --rounds 30  cases whose names contain "tiny"

Each side is a process that runs the ``memcnn`` of its commit with the cases and meters of this tree. Every round times
both sides, in alternating order. The command prints the table. Exit status: 0, or 1 if a side failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
import torch

from bench import measure
from bench.cases import Chain
from bench.networks import Network
from bench.worker import Failed, Interpreter, Worker

ROOT = Path(__file__).resolve().parents[1]
METERS = Path("memcnn") / "memory"  # it needs only torch; older commits have other meters or none


def cases() -> list:
    """Return the cases to compare."""
    return [
        *(Chain("chain", subject, 8, 4) for subject in ("plain", "keep-every-2", "wrapped", "reversible")),
        *(Chain("tiny", subject, 32, 2, 4, 4) for subject in ("plain", "wrapped", "reversible")),
        Network("revnet38", "reversible", 8),
    ]


def unpack(commit: str, folder: Path) -> str:
    """Put ``memcnn`` of a commit into a folder, with ``bench`` and the meters of this tree.

    Args:
        commit: any name that git resolves to a commit, or "." for the working tree.
        folder: an empty folder.

    Returns:
        The abbreviated hash of the commit, or "working tree".
    """
    if commit == ".":
        name = "working tree"
        shutil.copytree(ROOT / "memcnn", folder / "memcnn")
    else:
        name = _git("rev-parse", "--verify", "--short=12", f"{commit}^{{commit}}").decode().strip()
        archive = folder / "memcnn.zip"
        archive.write_bytes(_git("archive", "--format=zip", name, "memcnn"))
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)
        shutil.rmtree(folder / METERS, ignore_errors=True)
        shutil.copytree(ROOT / METERS, folder / METERS)
    shutil.copytree(ROOT / "bench", folder / "bench")
    return name


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode:
        raise SystemExit(f"bench.compare: git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def start(name: str, folder: Path, threads: int | None) -> Worker:
    """Start a process that measures with the packages of a folder; ``Side`` answers its questions."""
    environment = {"KINETO_LOG_LEVEL": "99", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    return Worker(name, "bench.compare:Side", interpreter=Interpreter(folder, environment=environment))


class Side:
    """One side of the comparison, in its own process. Its methods answer the questions of ``bench.worker``."""

    def __init__(self) -> None:
        self.cases = {str(case): case for case in cases()}

    def exact(self, case: str, device: str) -> dict:
        """Measure the memory of a step, and count the evaluations of F and G."""
        chosen, on = self.cases[case], torch.device(device)
        return measure.memory(chosen, on) | measure.evaluations(chosen, on)

    def seconds(self, case: str, device: str) -> dict:
        """Return the median time of a step."""
        return _seconds(self.cases[case], torch.device(device))


def _seconds(case, device: torch.device) -> dict:
    """Return the median time of a step."""
    step, rounds, steps = measure.warmed_up(case, device)
    seconds = []
    for _ in range(rounds):
        started = measure.clock()
        for _ in range(steps):
            step()
        seconds.append((measure.clock() - started) / steps)
    return {"seconds": pd.Series(seconds).median()}


def compared(sides: list[Worker], case: str, rounds: int, device: str) -> dict:
    """Measure one case on both sides, and return a row of the table."""
    from bench.result import spread  # its imports need the memcnn of this tree, which a worker does not have

    try:
        exact = [side.ask("exact", case=case, device=device) for side in sides]
        seconds: list[list[float]] = [[], []]
        for number in range(-1, rounds):  # the first round warms up
            for i in (0, 1) if number % 2 else (1, 0):
                answer = sides[i].ask("seconds", case=case, device=device)
                if number >= 0:
                    seconds[i].append(answer["seconds"])
    except Failed as failure:
        return {"case": case, "time B / A": f"failed: {' '.join(str(failure).split())}"}
    a, b = (pd.Series(values) for values in seconds)
    row = {
        "case": case,
        "time B / A": spread(b / a, 3),
        "n": rounds,
        "A, ms": f"{1e3 * a.median():.2f}",
        "B, ms": f"{1e3 * b.median():.2f}",
    }
    for metric in ("peak_bytes", "evaluations"):
        a, b = (answer[metric] for answer in exact)
        row[metric] = f"{a:,}, the same" if a == b else f"{a:,} -> {b:,} ({100 * (b / a - 1):+.2f} %)"
    return row


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", metavar="COMMIT", nargs=2, help="any name of a commit; . is the working tree")
    parser.add_argument("-k", metavar="TEXT", default="", help="only cases whose names contain TEXT")
    parser.add_argument("--rounds", type=int, default=15, help="rounds that time both sides (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="PyTorch's CPU threads (default: OMP_NUM_THREADS)")
    options = parser.parse_args()
    chosen = [str(case) for case in cases() if options.k in str(case)]
    if not chosen or options.rounds < 1:
        parser.error("nothing to measure: -k must match a case, and --rounds must be 1 or more")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in "AB"]
        for folder in folders:
            folder.mkdir()
        names = [unpack(commit, folder) for commit, folder in zip(options.commits, folders, strict=True)]
        sides = [start(name, folder, options.threads) for name, folder in zip("AB", folders, strict=True)]
        try:
            rows = []
            for number, case in enumerate(chosen, 1):
                print(f"[{number} of {len(chosen)}] {case}", file=sys.stderr, flush=True)
                rows.append(compared(sides, case, options.rounds, options.device))
        finally:
            for side in sides:
                side.end()
    print(
        f"A is {names[0]}, B is {names[1]}; {options.device}, torch {torch.__version__}, load average "
        f"{os.getloadavg()[0]:.1f}. Time: median [quartiles] of the ratio within a round.\n"
    )
    print(pd.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True))
    return int(any("failed" in row["time B / A"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
