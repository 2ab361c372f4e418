"""Processes that end without warning, and processes that meet."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from random import Random

from memcnn.training.files import HOLDER
from properties.faults.sandbox import INTERVAL, ITERATIONS, NAME, Sandbox

PAUSE = 0.1
"""Seconds of every step and every part of an evaluation: the first run must still be training when others start."""


def kill_at_a_random_instant(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """`kill -9` at a random instant, or when a file is next being written; up to five times a run"""
    left, in_writing, most = tries, 0, 0
    while left:
        runs = sandbox.new_runs()
        for _ in range(rng.randint(1, 5)):
            process, deadline = sandbox.start(runs), time.monotonic() + sandbox.seconds
            time.sleep(rng.uniform(0, sandbox.seconds))
            if rng.random() < 0.5:
                while time.monotonic() < deadline and not list(runs.glob("*/*.tmp")):
                    pass
            os.kill(process, signal.SIGKILL)
            if sandbox.wait(process) == 0:  # it ended before the kill
                break
            in_writing += bool(list(runs.glob("*/*.tmp")))
            most = max(most, sandbox.check_nothing_lost(runs))
            left -= 1
            if left:
                yield ""
            else:
                break
        sandbox.check_completes(runs)
    yield f"{in_writing} while a file was written; at most {most} iterations done again, of an interval of {INTERVAL}"


def kill_at_a_file_operation(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """`kill -9` just before the n-th operation on the run's files"""
    every = list(range(1, sandbox.operations + 1))
    numbers = rng.sample(every, min(tries, len(every)))
    numbers += rng.choices(every, k=tries - len(numbers))
    most = 0
    for number in numbers:
        runs = sandbox.new_runs()
        assert sandbox.run(runs, kill_at_operation=number) == -signal.SIGKILL
        most = max(most, sandbox.check_nothing_lost(runs))
        sandbox.check_completes(runs)
        yield f"{len(set(numbers))} of the {len(every)} operations of a run; at most {most} iterations done again"


def two_on_one_run(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """two to four processes on one run at once"""
    for _ in range(tries):
        runs = sandbox.new_runs()
        processes = [sandbox.start(runs, pause_seconds=PAUSE)]
        for _ in range(rng.randint(1, 3)):
            time.sleep(rng.uniform(0, 0.1))
            processes.append(sandbox.start(runs, pause_seconds=PAUSE))
        statuses = {process: sandbox.wait(process) for process in processes}
        trained = [process for process, status in statuses.items() if status == 0]
        assert len(trained) == 1 and set(statuses.values()) == {0, 1}, statuses
        claim = f"process {trained[0]} on {socket.gethostname()} (since "
        assert sandbox.output(runs).count(claim) == len(processes) - 1
        sandbox.check_result(runs)
        yield "one trains; each of the others names its process, its machine and the time at which it began"


def dead_holder(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """the process that trains a run is killed, and another one starts"""
    for _ in range(tries):
        runs = sandbox.new_runs()
        claim, process = runs / NAME / HOLDER, sandbox.start(runs, pause_seconds=PAUSE)
        while not claim.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, ITERATIONS * PAUSE / 2))
        os.kill(process, signal.SIGKILL)
        assert sandbox.wait(process) == -signal.SIGKILL
        message = f"Taking over from process {process} on {socket.gethostname()} (since "
        sandbox.check_completes(runs, message=message)
        yield "the new process takes the run over, and names the process that trained it before"


def clock_jumps(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a clock that jumps by decades at every reading, in a run that is stopped and resumed"""
    for _ in range(tries):
        runs, clocks = sandbox.new_runs(), [rng.randrange(2**31) for _ in range(2)]
        assert sandbox.run(runs, stop_at=rng.randrange(ITERATIONS), clock_seed=clocks[0]) == 3, sandbox.output(runs)
        sandbox.check_completes(runs, clock_seed=clocks[1])
        yield "the points of TensorBoard keep their order, too"


def loss_is_no_number(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a loss of NaN or infinity at a random iteration, then the same command again"""
    for _ in range(tries):
        runs, iteration, name = sandbox.new_runs(), rng.randrange(ITERATIONS), rng.choice(["nan", "inf"])
        number = {"nan": "nan", "inf": "6e37"}[name]
        assert sandbox.run(runs, spoil=(iteration, number)) == 1, sandbox.output(runs)
        message = f"(loss is {name} at iteration {iteration + 1}); try again from the last good checkpoint with: "
        assert message in sandbox.output(runs), sandbox.output(runs)
        sandbox.check_completes(runs)
        yield "the run fails and names the iteration; the same command resumes from the previous checkpoint"


FAULTS = (
    kill_at_a_random_instant, kill_at_a_file_operation, two_on_one_run, dead_holder, clock_jumps, loss_is_no_number,
)  # fmt: skip
