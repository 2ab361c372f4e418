"""Run each job in a fork of one interpreter, so that torch is imported once and each process can really be killed.

    python -m properties.faults.worker

Reads lines of JSON: {"start": JOB} forks a process that runs JOB, and answers with its id; {"wait": ID} answers with
its exit status, or -9 if it was killed. JOB holds the arguments of ``work``.
"""

import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import time
from itertools import count
from pathlib import Path

import torch
from torch import nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn import train as command
from memcnn.data import files, images
from memcnn.models.resnet import MODELS
from memcnn.training import environment
from memcnn.training.recipe import Recipe
from memcnn.training.step import EVALUATION_BATCHES

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.truncate")
"""Events of ``sys.addaudithook`` that change files or folders."""
LONGEST_SECONDS = 120
"""An alarm ends a longer process, with exit status -14."""
IMAGES = images.generate(10, train=40, test=50)


class Tiny(nn.Module):
    """A reversible network that takes a few milliseconds.

    Attributes:
        spoil: a number that is added to the logits in training, times -5 to 4; it makes the loss NaN or infinite.
        pause_seconds: the time for which each forward pass sleeps.
    """

    spoil: float | None = None
    pause_seconds = 0.0

    def __init__(self, num_classes: int = 10, *, disable: bool = False) -> None:
        super().__init__()
        blocks = [AdditiveCoupling(_branch(), _branch()) for _ in range(2)]
        self.inner = nn.Sequential(
            nn.Conv2d(3, 8, 8, stride=8),
            *(InvertibleModuleWrapper(block, disable=disable) for block in blocks),
            nn.Flatten(),
            nn.Linear(128, num_classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.inner(images)
        if self.training and Tiny.spoil is not None:
            logits = logits + Tiny.spoil * torch.arange(-5.0, 5.0)
        time.sleep(Tiny.pause_seconds)
        return logits


def _branch() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def work(
    *,
    words: list[str],
    log: str,
    tally: str,
    stop_at: int | None = None,
    spoil: tuple[int, str] | None = None,
    kill_at_operation: int | None = None,
    largest_file_bytes: int | None = None,
    clock_seed: int | None = None,
    pause_seconds: float = 0.0,
    official: dict[str, str] | None = None,
) -> int:
    """Run ``python -m memcnn.train WORDS`` in this process, and return its exit status.

    Args:
        words: the arguments of the command.
        log: a file for its output.
        tally: a file of two int64: the iteration that it is in, and the number of its operations on files.
        stop_at: the iteration before which it gets a SIGTERM.
        spoil: an iteration, and the number that spoils its logits (see ``Tiny``).
        kill_at_operation: the number of the operation on the folder of runs before which it is killed; from 1.
        largest_file_bytes: a limit to the size of files.
        clock_seed: seed of a wall clock that jumps by decades.
        pause_seconds: the time for which each forward pass sleeps.
        official: checksums (MD5) by file name, in place of CIFAR-10's.
    """
    signal.alarm(LONGEST_SECONDS)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    with open(tally, "r+b") as file:
        numbers = mmap.mmap(file.fileno(), 16)
    _watch_iterations(numbers, stop_at, spoil)
    _watch_operations(numbers, Path(words[words.index("--runs") + 1]), kill_at_operation)
    if largest_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file_bytes, resource.RLIM_INFINITY))
    if clock_seed is not None:
        _let_the_clock_jump(clock_seed)
    Tiny.pause_seconds = pause_seconds
    if official is not None:
        files.DATASETS["cifar10"] = _cifar(official)
    try:
        return command.main(words)
    except SystemExit as end:
        return end.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _let_the_clock_jump(seed: int) -> None:
    """Replace the wall clock by one that jumps by decades at every reading."""
    clock = random.Random(seed)
    time.time = lambda: clock.uniform(0, 4e9)
    time.time_ns = lambda: int(1e9 * time.time())


def _watch_iterations(numbers: mmap.mmap, stop_at: int | None, spoil: tuple[int, str] | None) -> None:
    """Whenever a step asks for its learning rate, write its iteration to the tally, and spoil or stop it."""
    original = Recipe.learning_rate_after

    def asked(recipe: Recipe, iterations: int) -> float:
        struct.pack_into("q", numbers, 0, max(iterations, *struct.unpack_from("q", numbers, 0)))
        Tiny.spoil = float(spoil[1]) if spoil and spoil[0] == iterations else None
        if iterations == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(recipe, iterations)

    Recipe.learning_rate_after = asked


def _watch_operations(numbers: mmap.mmap, runs: Path, kill_at: int | None) -> None:
    """Count the operations on files below ``runs`` in the tally, and kill this process before number ``kill_at``."""
    operations = count(1)

    def operation(event: str, arguments: tuple) -> None:
        if event in EVENTS and str(arguments[0]).startswith(f"{runs}{os.sep}"):
            number = next(operations)
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            struct.pack_into("q", numbers, 8, number)

    sys.addaudithook(operation)


def _cifar(official: dict[str, str]) -> type:
    """Return CIFAR-10's class with other checksums."""
    source = files.DATASETS["cifar10"]
    lists = {
        name: [[file, official[file]] for file, _ in getattr(source, name)] for name in ("train_list", "test_list")
    }
    meta = {**source.meta, "md5": official[source.meta["filename"]]}
    return type("CIFAR10", (source,), {**lists, "meta": meta})


def main() -> None:
    """Read orders from standard input until it ends, and answer each."""
    torch.set_num_threads(1)
    MODELS["resnet32"] = Tiny
    images.generate = lambda num_classes: IMAGES
    EVALUATION_BATCHES["cpu"] = 20
    environment.git_state = lambda: {"commit": None, "clean": None}  # git would take three processes a run
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        elif (child := os.fork()) == 0:
            status = 99
            try:
                status = work(**order["start"])
            finally:
                os._exit(status)
        else:
            print(child, flush=True)


if __name__ == "__main__":
    main()
