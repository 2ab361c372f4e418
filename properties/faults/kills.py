"""Processes that end without warning, and processes that meet."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from random import Random

from memcnn.training.files import HOLDER
from properties.faults.ground import INTERVAL, ITERATIONS, NAME, Ground

PAUSE = 0.1  # seconds of every step and part of an evaluation, so that a run is still going on when another one comes


def kill_at_a_random_instant(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """`kill -9` at a random instant, or at the next sight of a file being written; up to five times a run"""
    left, in_writing, most = tries, 0, 0
    while left:
        runs = ground.new_runs()
        for _ in range(rng.randint(1, 5)):
            process, deadline = ground.start(runs), time.monotonic() + ground.seconds
            time.sleep(rng.uniform(0, ground.seconds))
            if rng.random() < 0.5:
                while time.monotonic() < deadline and not list(runs.glob("*/*.tmp")):
                    pass
            os.kill(process, signal.SIGKILL)
            if ground.wait(process) == 0:  # it was faster
                break
            in_writing += bool(list(runs.glob("*/*.tmp")))
            most = max(most, ground.check_nothing_lost(runs))
            left -= 1
            if left:
                yield ""
            else:
                break
        ground.finishes(runs)
    yield f"{in_writing} while a file was written; at most {most} iterations done again, of an interval of {INTERVAL}"


def kill_at_a_file_operation(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """`kill -9` just before the n-th operation on the run's files"""
    every = list(range(1, ground.operations + 1))
    numbers = rng.sample(every, min(tries, len(every)))
    numbers += rng.choices(every, k=tries - len(numbers))
    most = 0
    for number in numbers:
        runs = ground.new_runs()
        assert ground.run(runs, kill_at_operation=number) == -signal.SIGKILL
        most = max(most, ground.check_nothing_lost(runs))
        ground.finishes(runs)
        yield f"{len(set(numbers))} of the {len(every)} operations of a run; at most {most} iterations done again"


def two_on_one_run(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """two to four processes on one run at once"""
    for _ in range(tries):
        runs = ground.new_runs()
        processes = [ground.start(runs, pause_seconds=PAUSE)]
        for _ in range(rng.randint(1, 3)):
            time.sleep(rng.uniform(0, 0.1))
            processes.append(ground.start(runs, pause_seconds=PAUSE))
        ended = {process: ground.wait(process) for process in processes}
        winners = [process for process, status in ended.items() if status == 0]
        assert len(winners) == 1 and set(ended.values()) == {0, 1}, ended
        claim = f"process {winners[0]} on {socket.gethostname()} (since "
        assert ground.said(runs).count(claim) == len(processes) - 1
        ground.check_result(runs)
        yield "one trains; every other one says which process on which machine does, since when"


def dead_holder(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """the process that holds a run is killed, and another one comes"""
    for _ in range(tries):
        runs = ground.new_runs()
        claim, process = runs / NAME / HOLDER, ground.start(runs, pause_seconds=PAUSE)
        while not claim.exists():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, ITERATIONS * PAUSE / 2))
        os.kill(process, signal.SIGKILL)
        assert ground.wait(process) == -signal.SIGKILL
        says = f"Taking over from process {process} on {socket.gethostname()} (since "
        ground.finishes(runs, says=says)
        yield "the claim is taken over, and it is said whose it was"


def clock_jumps(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a clock that jumps by decades at every look, stopped and taken up in between"""
    for _ in range(tries):
        runs, clocks = ground.new_runs(), [rng.randrange(2**31) for _ in range(2)]
        assert ground.run(runs, stop_at=rng.randrange(ITERATIONS), clock_seed=clocks[0]) == 3, ground.said(runs)
        ground.finishes(runs, clock_seed=clocks[1])
        yield "TensorBoard keeps the order, too"


def loss_is_no_number(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a loss of NaN or infinity at a random iteration, and the same command again"""
    for _ in range(tries):
        runs, iteration, name = ground.new_runs(), rng.randrange(ITERATIONS), rng.choice(["nan", "inf"])
        number = {"nan": "nan", "inf": "6e37"}[name]
        assert ground.run(runs, spoil=(iteration, number)) == 1, ground.said(runs)
        said = f"(loss is {name} at iteration {iteration + 1}); try again from the last good checkpoint with: "
        assert said in ground.said(runs), ground.said(runs)
        ground.finishes(runs)
        yield "status failed, the iteration is named; the checkpoint before is good"


FAULTS = (
    kill_at_a_random_instant, kill_at_a_file_operation, two_on_one_run, dead_holder, clock_jumps, loss_is_no_number,
)  # fmt: skip
