"""Two commits side by side: time in alternation, memory and evaluations of F and G exactly.

    python -m bench.compare HEAD~3 HEAD
    python -m bench.compare main .                     "." is the tree as it is, uncommitted changes included
    python -m bench.compare v1 v2 -k tiny --rounds 30  cases whose names contain "tiny"

`memcnn` is that of either commit; the cases and the meters are this tree's. Each side is a process of its own; in every
round both are timed, each time the other one first. Writes the table to standard output.
"""

import argparse
import json
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
from bench.peer_tables import spread

ROOT = Path(__file__).resolve().parents[1]
METERS = Path("memcnn") / "memory"  # it needs nothing but torch; older commits have no such meters, or other ones


def cases() -> list:
    return [
        *(Chain("chain", subject, 8, 4) for subject in ("plain", "keep-every-2", "wrapped", "reversible")),
        *(Chain("tiny", subject, 32, 2, 4, 4) for subject in ("plain", "wrapped", "reversible")),
        Network("revnet38", "reversible", 8),
    ]


def unpack(commit: str, folder: Path) -> str:
    """Put `memcnn` of a commit and `bench` of this tree into the folder; what the commit is called."""
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


class Side:
    """A process that measures with the packages of a folder."""

    def __init__(self, folder: Path, threads: int | None):
        command = [sys.executable, "-W", "ignore", "-m", "bench.compare", "--serve"]
        environment = {**os.environ, "KINETO_LOG_LEVEL": "99"}
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, question: str, case: str, device: str) -> dict:
        """{"failed": why} where there is no answer."""
        try:
            print(json.dumps([question, case, device]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"failed": "its process has ended"}

    def end(self) -> None:
        with self.process:  # closes its stdin, on which it ends
            pass


def serve() -> None:
    """Answer questions from standard input: a line of JSON each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    known = {str(case): case for case in cases()}
    for line in sys.stdin:
        question, case, device = json.loads(line)
        try:
            answer = QUESTIONS[question](known[case], torch.device(device))
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


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


QUESTIONS = {"memory": measure.memory, "evaluations": measure.evaluations, "seconds": _seconds}


def compared(sides: list[Side], case: str, rounds: int, device: str) -> dict:
    """A row of the table."""
    exact = [side.ask("memory", case, device) | side.ask("evaluations", case, device) for side in sides]
    seconds: list[list[float]] = [[], []]
    for number in range(-1, rounds):  # the first warms up
        for i in (0, 1) if number % 2 else (1, 0):
            answer = sides[i].ask("seconds", case, device)
            exact[i] |= {"failed": answer["failed"]} if "failed" in answer else {}
            if number >= 0:
                seconds[i].append(answer.get("seconds", float("nan")))
        if any("failed" in answer for answer in exact):
            break
    row = {"case": case}
    for answer, name in zip(exact, "AB", strict=True):
        if "failed" in answer:
            row["time B / A"] = f"{name} failed: {answer['failed']}"
    if "time B / A" not in row:
        a, b = (pd.Series(values) for values in seconds)
        row |= {
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
    parser = argparse.ArgumentParser(
        prog="bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commits", metavar="COMMIT", nargs=2, help="any name that git knows; . is the tree as it is")
    parser.add_argument("-k", metavar="TEXT", default="", help="only cases whose names contain it")
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: as OMP_NUM_THREADS says)")
    options = parser.parse_args()
    chosen = [str(case) for case in cases() if options.k in str(case)]
    if not chosen or options.rounds < 1:
        parser.error("nothing to do: -k leaves no case, or --rounds is below 1")
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in "AB"]
        for folder in folders:
            folder.mkdir()
        names = [unpack(commit, folder) for commit, folder in zip(options.commits, folders, strict=True)]
        sides = [Side(folder, options.threads) for folder in folders]
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
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main())
