"""Everything there is to measure on a GPU, in one command, into one folder that can be committed as it is.

    python -m bench.gpu_day                               into reports/bench/<device>
    python -m bench.gpu_day --budget 13m                  on a GPU that is lent for a quarter of an hour
    python -m bench.gpu_day --stages tests,memory         only some of it

Stages: the tests that touch a GPU; the time of a training step of each network in the fastest execution, deterministic
and not, alone and four runs together; the memory of a step; the benchmark suites. Each has a time limit, a stage that
fails or runs over its limit does not keep the others from running, and each one's results are on the disk as soon as
they are measured. Exit status: 0 if all stages succeeded, 1 if one did not, 2 for misuse.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import folders
from bench.worker import kill_group
from memcnn.models.resnet import MODELS
from memcnn.training.files import write_by_rename
from memcnn.training.options import duration

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = "gpu-day.md"
TESTS = "cuda-tests.txt"
LAST_LINES = 40  # of the tests' output: failures and their count


@dataclass(frozen=True)
class Stage:
    """A command of this repository, and the seconds after which it is ended."""

    kind: str
    name: str
    module: str
    arguments: tuple[str, ...]
    limit_seconds: float

    @property
    def shown(self) -> str:
        """The command as a reader would type it."""
        words = [f'"{word}"' if " " in word else word for word in self.arguments]
        return " ".join(["python -m", self.module, *words])


KINDS = ("tests", "speed", "memory", "suites")


def stages(folder: Path, device: str, group: int) -> list[Stage]:
    """Return all stages, in the order in which they run.

    Args:
        folder: where the results go.
        device: "cuda" or "cuda:1".
        group: number of runs whose steps are interleaved.
    """
    out, on = ("--out", str(folder)), ("--device", device)
    tests = ("-q", "-p", "no:cacheprovider", "-k", "cuda or gpu", "properties")
    speed = ("--fast", "--group", str(group), *on, *out)
    suites = ("--quick", "-k", "not compile", "--budget", "165s", *on, "--report", str(folder))
    return [
        Stage("tests", "tests that touch a GPU", "pytest", tests, 240),
        *(Stage("speed", f"speed of {name}", "bench.speed", ("--networks", name, *speed), 150) for name in MODELS),
        Stage("memory", "memory of a step", "bench.measured_memory", (*on, *out), 120),
        Stage("suites", "benchmark suites", "bench", suites, 180),
    ]


def run(stage: Stage, limit_seconds: float, log: Path | None) -> str:
    """Run a stage, show its output, and return what became of it: "done", "failed (status 1)" or "over its limit".

    Args:
        stage: what runs; its processes are ended when the time is over.
        limit_seconds: the time that it may take.
        log: file for the end of its output; None for none.
    """
    command = [sys.executable, "-m", stage.module, *stage.arguments]
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(limit_seconds, 1))
            status = "done" if process.returncode == 0 else f"failed (status {process.returncode})"
        except BaseException as error:
            kill_group(process)
            output, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            status = "over its limit"
    lines = output.splitlines()
    print(*lines, sep="\n", flush=True)
    if log is not None:
        text = "\n".join([stage.shown, *lines[-LAST_LINES:]]).replace(f"{ROOT}{os.sep}", "")
        write_by_rename(log, (text + "\n").encode())
    return status


def summary(environment: dict, rows: list[tuple[Stage, float, str]]) -> str:
    """Return the list of stages as Markdown, with where and with what they ran."""
    device, software = environment["device"], environment["software"]
    changes = "" if environment["clean"] in (True, None) else " with local changes"
    lines = [
        "# Measured on a GPU",
        "",
        f"{device['name']}; torch {software['torch']}, CUDA {software['cuda']}, cuDNN {software.get('cudnn')}, Python "
        f"{software['python']}, commit {(environment['commit'] or 'unknown')[:12]}{changes}. Clock: wall.",
        "",
        "| stage | seconds | outcome | command |",
        "| --- | ---: | --- | --- |",
    ]
    lines += [f"| {stage.name} | {seconds:.0f} | {status} | `{stage.shown}` |" for stage, seconds, status in rows]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bench.gpu_day", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--budget", type=duration, metavar="TIME", help="be done before so much time is over: 13m")
    add("--group", type=int, default=4, metavar="N", help="runs whose steps are interleaved (default: %(default)s)")
    add("--stages", default=",".join(KINDS), metavar="A,B,...", help="of %(default)s")
    folders.add_place_options(parser, "all results", device="cuda")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    wanted = given.stages.split(",")
    if unknown := sorted(set(wanted) - set(KINDS)):
        parser.error(f"--stages: got {', '.join(unknown)}, wanted some of {', '.join(KINDS)}")
    device, folder = folders.place_of(parser, given)
    if device.type != "cuda":
        parser.error(f"--device: got {given.device}, wanted a GPU; on a CPU: python -m bench, python -m bench.speed")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    environment = folders.environment(device, "wall")
    rows: list[tuple[Stage, float, str]] = []
    for stage in stages(shown, given.device, given.group):
        if stage.kind not in wanted:
            continue
        begun = time.monotonic()
        left = float("inf") if given.budget is None else given.budget - (begun - started)
        print(f"== {stage.name}: {stage.shown}", flush=True)
        log = folder / TESTS if stage.kind == "tests" else None
        status = run(stage, min(stage.limit_seconds, left), log) if left > 1 else "not begun: the budget is used up"
        rows.append((stage, time.monotonic() - begun, status))
        write_by_rename(folder / SUMMARY, summary(environment, rows).encode())  # as far as it has come
    print(summary(environment, rows))
    return int(any(status != "done" for _, _, status in rows))


if __name__ == "__main__":
    sys.exit(main())
