"""Run tiny trainings in processes of their own, and compare their files with those of an undisturbed run."""

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from memcnn.training import checkpoint, record
from memcnn.training.files import HOLDER, LOCK
from memcnn.training.recipe import SMOKE, override
from memcnn.training.record import run_name
from properties.support.runs import assert_same_run, curve_of

ROOT = Path(__file__).resolve().parents[2]
INTERVAL, ITERATIONS = 4, 16
WORDS = f"""resnet32 cifar10 --recipe smoke --batch-size 8 --iterations {ITERATIONS} --milestones 6,11
    --evaluate-every {INTERVAL} --data generated --device cpu""".split()
RECIPE = override(
    SMOKE, batch_size=8, iterations=ITERATIONS, milestones=(6, 11), evaluate_every=INTERVAL, test_images=45
)
NAME = run_name("resnet32", "cifar10", RECIPE, 0, data="generated")

FILES = {"record.json", "curve.csv", "checkpoint.pt", "checkpoint.previous.pt", "tensorboard", LOCK}


class Sandbox:
    """A folder in which faults are tried, and a worker (see ``properties.faults.worker``) that starts processes.

    Attributes:
        folder: an empty folder for the runs and their logs.
        folders_made: the number of folders of runs that ``new_runs`` has named.
        expected: the folder of runs with the undisturbed run.
        seconds: the duration of the undisturbed run.
        operations: the number of operations of the undisturbed run on its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.folders_made = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "properties.faults.worker"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.worker.stdout.readline()  # "ready"
        self.expected = self.new_runs()
        started = time.monotonic()
        assert self.run(self.expected) == 0, self.output(self.expected)
        self.seconds = time.monotonic() - started
        self.operations = self._tally(self.expected)[1]

    def close(self) -> None:
        """End the worker."""
        self.worker.stdin.close()
        self.worker.wait(timeout=60)
        self.worker.stdout.close()

    def new_runs(self, where: Path | None = None) -> Path:
        """Return a path for a folder of runs that nobody has used yet."""
        self.folders_made += 1
        return (where or self.folder) / f"runs-{self.folders_made}"

    def start(self, runs: Path, *more: str, **job) -> int:
        """Start the tiny run, and return the id of its process.

        Args:
            runs: the folder of runs.
            more: further arguments of ``memcnn.train``.
            job: options of ``worker.work``, such as the iteration at which the process is stopped.
        """
        runs.mkdir(exist_ok=True)
        log, tally = (self.folder / f"{runs.name}.{kind}" for kind in ("log", "tally"))
        for path in (log, tally):
            path.touch()
        with open(tally, "r+b") as file:  # overwrites it in place, because another process may have mapped it
            file.write(bytes(16))
        words = [*WORDS, "--test-images", "45", "--runs", str(runs), *more]
        return self._ask({"start": {"words": words, "log": str(log), "tally": str(tally), **job}})

    def wait(self, process: int) -> int:
        """Wait for a process that was started, and return its exit status; -9 if it was killed."""
        return self._ask({"wait": process})

    def run(self, runs: Path, *more: str, **job) -> int:
        """Run the tiny run to its end, as ``start`` does, and return its exit status."""
        return self.wait(self.start(runs, *more, **job))

    def _ask(self, order: dict) -> int:
        self.worker.stdin.write(json.dumps(order) + "\n")
        self.worker.stdin.flush()
        return int(self.worker.stdout.readline())

    def output(self, runs: Path) -> str:
        """Return all output of the processes on ``runs``."""
        return (self.folder / f"{runs.name}.log").read_text()

    def _tally(self, runs: Path) -> tuple[int, int]:
        """Return the iteration that the run was in at last, and the number of its operations on files."""
        return struct.unpack("qq", (self.folder / f"{runs.name}.tally").read_bytes())

    def interrupted_run(self, rng: Random, runs: Path | None = None) -> Path:
        """Stop a run by SIGTERM when it has two checkpoints or more, and return its folder of runs."""
        runs = runs or self.new_runs()
        assert self.run(runs, stop_at=rng.randrange(2 * INTERVAL + 1, ITERATIONS)) == 3, self.output(runs)
        return runs

    def check_completes(self, runs: Path, *more: str, message: str = "", **job) -> None:
        """Run the command; assert that it ends well, prints ``message`` and has the bits of the undisturbed run."""
        status = self.run(runs, *more, **job)
        assert status == 0 and message in self.output(runs), f"status {status}: {self.output(runs)}"
        self.check_result(runs)

    def check_refusal(self, runs: Path, *more: str, status: int, message: str, **job) -> None:
        """Run the command; assert that it ends with ``status``, prints ``message`` and changes no file of the runs.

        ``message`` may consist of parts, separated by " ... ", which must be printed in their order.
        """
        before = contents(runs)
        found = self.run(runs, *more, **job)
        output, place = self.output(runs), 0
        assert found == status, f"status {found}: {output}"
        for part in message.split(" ... "):
            place = output.find(part, place)
            assert place >= 0, f"not printed: {part}\n{output}"
        assert "Traceback" not in output
        assert contents(runs) == before, "files have changed"

    def check_result(self, runs: Path) -> None:
        """Assert that the run equals the undisturbed one, and that its folder holds no other files."""
        assert_same_run(runs / NAME, self.expected / NAME)
        # a process that is killed at its end leaves the file of its claim
        left = {path.name for path in (runs / NAME).iterdir()} - {checkpoint.DAMAGED, HOLDER}
        assert left == FILES, f"missing or left behind: {left ^ FILES}"

    def check_nothing_lost(self, runs: Path) -> int:
        """Assert that every file of an interrupted run is whole; return the number of iterations to repeat.

        A run may lose one interval between checkpoints at most.
        """
        folder, last = runs / NAME, 0
        names = [name for name in ("checkpoint.pt", "checkpoint.previous.pt") if (folder / name).exists()]
        if names:
            last = max(checkpoint.read(folder / name)[1].iteration for name in names)  # raises if one is half a file
        if (folder / "record.json").exists():
            record.load(folder)
            assert curve_of(folder)
        lost = self._tally(runs)[0] + 1 - last  # the iteration that it was in may have been complete
        assert lost <= INTERVAL, f"{lost} iterations lost, of an interval of {INTERVAL}"
        return max(lost, 0)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below ``folder`` by its path there, without the files of locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK, HOLDER)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def small_disk(folder: Path, *, mebibytes: int) -> Iterator[bool]:
    """Make ``folder`` a small disk; yield True, or False if this process may not mount disks: an ordinary folder."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    with suppress(FileNotFoundError):
        if subprocess.run(words, capture_output=True).returncode == 0:
            try:
                yield True
            finally:
                subprocess.run(["umount", "-l", str(folder)], check=True)
            return
    yield False
