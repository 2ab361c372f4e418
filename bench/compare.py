"""Compare two commits: time in alternating rounds, memory and evaluations of F and G exactly.

    python -m bench.compare HEAD~3 HEAD
    python -m bench.compare main .                     "." is the working tree, with its uncommitted changes
    python -m bench.compare v1 v2 -k tiny --rounds 30  cases whose names contain "tiny"

Each side is a process that runs the ``memcnn`` of its commit with the cases and meters of this tree. Every round times
both sides, in alternating order. The command prints the table. Exit status: 0, or 1 if a side failed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from bench import folders
from bench.result import spread
from bench.side import cases
from bench.tables import markdown
from bench.worker import Failed, Interpreter, Worker
from memcnn import cli

ROOT = Path(__file__).resolve().parents[1]
METERS = Path("memcnn") / "memory"  # it needs only torch; older commits have other meters or none


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
        try:
            name = _git("rev-parse", "--verify", "--short=12", "--end-of-options", f"{commit}^{{commit}}")
        except cli.Misuse:
            raise cli.Misuse(
                f"got {commit!r}, which names no commit of {ROOT}; wanted a hash, a branch, a tag or HEAD~3, as "
                'git log shows them, or "." for the working tree'
            ) from None
        name = name.decode().strip()
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
        reason = done.stderr.decode().strip().splitlines()
        raise cli.Misuse(f"git {' '.join(arguments)}: {reason[-1] if reason else f'status {done.returncode}'}")
    return done.stdout


def start(name: str, folder: Path, threads: int | None) -> Worker:
    """Start a process that measures with the packages of a folder; ``bench.side.Side`` answers its questions."""
    environment = {"KINETO_LOG_LEVEL": "99", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    return Worker(name, "bench.side:Side", interpreter=Interpreter(folder, environment=environment))


def compared(sides: list[Worker], case: str, rounds: int, device: str) -> dict:
    """Measure one case on both sides, and return a row of the table."""
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


@cli.command("bench.compare")
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit status."""
    parser = cli.parser_from("bench.compare", __doc__, whole=True)
    parser.add_argument("commits", metavar="COMMIT", nargs=2, help="any name of a commit; . is the working tree")
    parser.add_argument("-k", metavar="TEXT", default="", help="only cases whose names contain TEXT")
    parser.add_argument(
        "--rounds", type=cli.count, default=15, help="rounds that time both sides (default: %(default)s)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=cli.threads, help="PyTorch's CPU threads (default: OMP_NUM_THREADS)")
    options = parser.parse_args(arguments)
    chosen = [str(case) for case in cases() if options.k in str(case)]
    if not chosen:
        parser.error(f"argument -k: got {options.k!r}, wanted a part of a case's name: {', '.join(map(str, cases()))}")
    try:
        folders.choose_device(options.device)
    except ValueError as error:
        parser.error(f"--{error}")
    with tempfile.TemporaryDirectory() as temporary:
        trees = [Path(temporary) / name for name in "AB"]
        for folder in trees:
            folder.mkdir()
        names = [unpack(commit, folder) for commit, folder in zip(options.commits, trees, strict=True)]
        sides = [start(name, folder, options.threads) for name, folder in zip("AB", trees, strict=True)]
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
    print(markdown(pd.DataFrame(rows).fillna("")))
    return int(any("failed" in row["time B / A"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
