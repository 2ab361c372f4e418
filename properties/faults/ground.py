"""The ground for fault tests: tiny runs in their own processes, and the final state of an undisturbed run."""

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

import torch

from memcnn.training import checkpoint, record
from memcnn.training.files import HOLDER, LOCK
from memcnn.training.recipe import SMOKE, override
from memcnn.training.record import run_name
from properties.support.runs import curve_of, scalars, without

ROOT = Path(__file__).resolve().parents[2]
INTERVAL, ITERATIONS = 4, 16
WORDS = f"""resnet32 cifar10 --recipe smoke --batch-size 8 --iterations {ITERATIONS} --milestones 6,11
    --evaluate-every {INTERVAL} --data generated --device cpu""".split()
RECIPE = override(
    SMOKE, batch_size=8, iterations=ITERATIONS, milestones=(6, 11), evaluate_every=INTERVAL, test_images=45
)
NAME = run_name("resnet32", "cifar10", RECIPE, 0, data="generated")
OF_THE_SESSION = ("train_seconds", "interruptions", "segments")
FILES = {"record.json", "curve.csv", "checkpoint.pt", "checkpoint.previous.pt", "tensorboard", LOCK}


class Ground:
    """A folder to try faults in, and a worker (see `properties.faults.worker`) to run processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.made = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.worker = subprocess.Popen(
            [sys.executable, "-m", "properties.faults.worker"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.worker.stdout.readline()  # it is ready
        self.expected = self.new_runs()
        started = time.monotonic()
        assert self.run(self.expected) == 0, self.said(self.expected)
        self.seconds = time.monotonic() - started
        self.operations = self._tally(self.expected)[1]

    def close(self) -> None:
        self.worker.stdin.close()
        self.worker.wait(timeout=60)
        self.worker.stdout.close()

    def new_runs(self, where: Path | None = None) -> Path:
        """A path for a folder of runs that nobody has used yet."""
        self.made += 1
        return (where or self.folder) / f"runs-{self.made}"

    def start(self, runs: Path, *more: str, **job) -> int:
        """Start the tiny run in `runs`; the process's id. `more` goes to the command line, `job` to `worker.work`."""
        runs.mkdir(exist_ok=True)
        log, tally = (self.folder / f"{runs.name}.{kind}" for kind in ("log", "tally"))
        for path in (log, tally):
            path.touch()
        with open(tally, "r+b") as file:  # which another process may have mapped
            file.write(bytes(16))
        words = [*WORDS, "--test-images", "45", "--runs", str(runs), *more]
        return self._ask({"start": {"words": words, "log": str(log), "tally": str(tally), **job}})

    def wait(self, process: int) -> int:
        """The exit status of a process that was started; -9 for a killed one."""
        return self._ask({"wait": process})

    def run(self, runs: Path, *more: str, **job) -> int:
        return self.wait(self.start(runs, *more, **job))

    def _ask(self, order: dict) -> int:
        self.worker.stdin.write(json.dumps(order) + "\n")
        self.worker.stdin.flush()
        return int(self.worker.stdout.readline())

    def said(self, runs: Path) -> str:
        """All that the processes on `runs` have said."""
        return (self.folder / f"{runs.name}.log").read_text()

    def _tally(self, runs: Path) -> tuple[int, int]:
        return struct.unpack("qq", (self.folder / f"{runs.name}.tally").read_bytes())

    def partial(self, rng: Random, runs: Path | None = None) -> Path:
        """The folder of runs with one that was stopped by a SIGTERM when it had two checkpoints or more."""
        runs = runs or self.new_runs()
        assert self.run(runs, stop_at=rng.randrange(2 * INTERVAL + 1, ITERATIONS)) == 3, self.said(runs)
        return runs

    def finishes(self, runs: Path, *more: str, says: str = "", **job) -> None:
        """The run goes on to its end, says so, and ends with the bits of the undisturbed one."""
        status = self.run(runs, *more, **job)
        assert status == 0 and says in self.said(runs), f"status {status}: {self.said(runs)}"
        self.check_result(runs)

    def refuses(self, runs: Path, *more: str, status: int, says: str, **job) -> None:
        """The command ends with `status` and the words of `says`, in their order, and changes no file of the runs."""
        before = contents(runs)
        found = self.run(runs, *more, **job)
        said, place = self.said(runs), 0
        assert found == status, f"status {found}: {said}"
        for words in says.split(" ... "):
            place = said.find(words, place)
            assert place >= 0, f"not said: {words}\n{said}"
        assert "Traceback" not in said
        assert contents(runs) == before, "files have changed"

    def check_result(self, runs: Path) -> None:
        folder, expected = runs / NAME, self.expected / NAME
        found, wanted = (checkpoint.read(each / "checkpoint.pt")[1] for each in (folder, expected))
        for part in ("model", "optimizer"):
            torch.testing.assert_close(getattr(found, part), getattr(wanted, part), rtol=0, atol=0)
        rows, wanted_rows = curve_of(folder), curve_of(expected)
        assert [without(row, "train_seconds") for row in rows] == [without(row, "train_seconds") for row in wanted_rows]
        one, other = (without(vars(record.load(each)), *OF_THE_SESSION) for each in (folder, expected))
        assert one == other
        assert scalars(folder) == scalars(expected)
        left = {path.name for path in folder.iterdir()} - {checkpoint.DAMAGED, HOLDER}  # of a process killed at its end
        assert left == FILES, f"left behind: {left ^ FILES}"

    def check_nothing_lost(self, runs: Path) -> int:
        """Every file of an interrupted run is whole; how many iterations its end has cost, one interval at most."""
        folder, last = runs / NAME, 0
        names = [name for name in ("checkpoint.pt", "checkpoint.previous.pt") if (folder / name).exists()]
        if names:
            last = max(checkpoint.read(folder / name)[1].iteration for name in names)  # none of them is half a file
        if (folder / "record.json").exists():
            record.load(folder)
            assert curve_of(folder)
        lost = self._tally(runs)[0] + 1 - last  # the one that it was in may have been over
        assert lost <= INTERVAL, f"{lost} iterations lost, of an interval of {INTERVAL}"
        return max(lost, 0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but for what a lock says."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in (LOCK, HOLDER)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@contextmanager
def small_disk(folder: Path, *, mebibytes: int) -> Iterator[bool]:
    """`folder` on a file system of its own; False, and an ordinary folder, where this process may not mount one."""
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
