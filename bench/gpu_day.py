"""Run all GPU measurements with one command, and write them to one folder that is ready to commit.

    python -m bench.gpu_day                               into reports/bench/<device>
    python -m bench.gpu_day --budget 13m                  within 13 minutes
    python -m bench.gpu_day --stages tests,memory         only some of it

The stages are:

* tests: the tests that use a GPU;
* speed: the time of a training step of each network in the fastest execution and the fastest deterministic one, alone
  and with four runs together, and the kernels of these steps;
* memory: the memory of a training step;
* suites: the benchmark suites.

Each stage has a time limit; together they allow 39 minutes. If a stage fails or exceeds its limit, the next one starts
all the same. Results are on the disk as soon as they are measured. Exit status: 0 if all stages succeeded, 1 if one did
not, 2 for misuse.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import folders
from bench.worker import kill_group
from memcnn import cli
from memcnn.models.resnet import MODELS
from memcnn.training.files import write_by_rename
from memcnn.training.options import duration

ROOT = Path(__file__).resolve().parents[1]
SUMMARY = "gpu-day.md"
TESTS = "cuda-tests.txt"
LAST_LINES = 40
"""Number of lines of the tests' output to keep: they name the failures and their count."""


@dataclass(frozen=True)
class Stage:
    """A command of this repository.

    Attributes:
        kind: one of ``KINDS``, the names that --stages takes.
        name: the stage's name in the summary.
        module: the module that ``python -m`` runs.
        arguments: the module's arguments.
        limit_seconds: the time after which the stage is ended.
    """

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


def workers() -> int:
    """Return how many processes share the tests: one for each core of the CPU, but at most twelve."""
    return min(12, os.cpu_count() or 1)


def stages(folder: Path, device: str, group: int) -> list[Stage]:
    """Return all stages in the order in which they run.

    Args:
        folder: the folder of the results.
        device: "cuda" or "cuda:1".
        group: number of runs whose steps are interleaved.
    """
    out, on = ("--out", str(folder)), ("--device", device)
    quiet = ("-q", "-p", "no:cacheprovider", "--benchmark-disable")
    tests = (*quiet, "-n", str(workers()), "-k", "cuda or gpu", "properties")
    speed = ("--fast", "--kernels", "--group", str(group), *on, *out)
    suites = ("--quick", "-k", "not compile", "--budget", "165s", *on, "--report", str(folder))
    return [
        Stage("tests", "tests that touch a GPU", "pytest", tests, 240),
        *(Stage("speed", f"speed of {name}", "bench.speed", ("--networks", name, *speed), 300) for name in MODELS),
        Stage("memory", "memory of a step", "bench.measured_memory", (*on, *out), 120),
        Stage("suites", "benchmark suites", "bench", suites, 180),
    ]


def run(stage: Stage, limit_seconds: float, log: Path | None) -> str:
    """Run a stage and print its output. Return its outcome: "done", "failed (status 1)" or "over its limit".

    Args:
        stage: the stage; its processes are killed at the time limit.
        limit_seconds: the time limit.
        log: file that receives the last lines of the output; None to write no file.
    """
    command = [sys.executable, "-m", stage.module, *stage.arguments]
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
    """Return device, software and the list of stages as Markdown."""
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


@cli.command("bench.gpu_day")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, write and print the summary; return the exit status."""
    parser = cli.parser_from("bench.gpu_day", __doc__, whole=True)
    add = parser.add_argument
    add("--budget", type=duration, metavar="TIME", help="finish within this time, such as 13m")
    add(
        "--group",
        type=cli.count,
        default=4,
        metavar="N",
        help="runs whose steps are interleaved (default: %(default)s)",
    )
    add("--stages", type=cli.names(KINDS), default=list(KINDS), metavar="A,B,...", help=f"some of {','.join(KINDS)}")
    folders.add_place_options(parser, "all results", device="cuda")
    given = parser.parse_args(arguments)
    started = time.monotonic()
    device, folder = folders.place_of(parser, given)
    if device.type != "cuda":
        parser.error(
            f"--device: got {given.device}, wanted a GPU; on a CPU run python -m bench or python -m bench.speed"
        )
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    environment = folders.environment(device, "wall")
    rows: list[tuple[Stage, float, str]] = []
    for stage in stages(shown, given.device, given.group):
        if stage.kind not in given.stages:
            continue
        begun = time.monotonic()
        left = float("inf") if given.budget is None else given.budget - (begun - started)
        print(f"== {stage.name}: {stage.shown}", flush=True)
        log = folder / TESTS if stage.kind == "tests" else None
        status = run(stage, min(stage.limit_seconds, left), log) if left > 1 else "not started: the budget is used up"
        rows.append((stage, time.monotonic() - begun, status))
        write_by_rename(folder / SUMMARY, summary(environment, rows).encode())  # written after each stage
    print(summary(environment, rows))
    return int(any(status != "done" for _, _, status in rows))


if __name__ == "__main__":
    sys.exit(main())
