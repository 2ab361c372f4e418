"""The seconds that a run needs on a device, from a short measurement or from the record of an equal run."""

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier

import torch

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.job import Job, Place
from memcnn.training.preview import step_seconds_of_records
from memcnn.training.recipe import Recipe
from memcnn.training.step import EVALUATION_BATCHES, Evaluation, TrainingStep
from memcnn.training.turns import Lane

TIMED_SECONDS = 1.5
"""Seconds for which steps are timed. At least one step is timed."""
READING_SECONDS = {"files": 5.0, cifar.GENERATED: 1.0}
"""Seconds allowed for reading or generating the images, and for reading the checkpoint."""
START_SECONDS = {False: 15.0, True: 120.0}
"""Seconds allowed for a start that was not timed, without and with compilation."""
TEST_IMAGES = 10_000


@dataclass(frozen=True)
class Cost:
    """The seconds that the parts of a run need.

    Attributes:
        start_seconds: time until the first step: making the network, compiling, capturing.
        step_seconds: time from one step to the next. If runs share the device, each of them makes a step meanwhile.
        evaluation_seconds: time of one evaluation.
        source: the origin of the numbers, as text.
    """

    start_seconds: float
    step_seconds: float
    evaluation_seconds: float
    source: str

    def seconds(self, recipe: Recipe, done: int) -> float:
        """Return the seconds that a run still needs after ``done`` iterations of a recipe."""
        evaluations = math.ceil(recipe.iterations / recipe.evaluate_every) - done // recipe.evaluate_every
        left = recipe.iterations - done
        return self.start_seconds + left * self.step_seconds + evaluations * self.evaluation_seconds


def cost_of_records(job: Job, execution: Execution, place: Place, device: torch.device) -> Cost | None:
    """Return the cost of a job from the record of an equal run; None if there is none.

    Records do not contain the times of start and evaluation. The start is ``START_SECONDS``. A batch of an evaluation
    counts as much as a training step, although it needs only a forward pass.
    """
    found = step_seconds_of_records(job, execution, place, device)
    if found is None:
        return None
    evaluation = found[0] * (job.recipe.test_images or TEST_IMAGES) / job.recipe.batch_size
    return Cost(START_SECONDS[execution.compile], found[0], evaluation, found[1])


def timed(job: Job, execution: Execution, place: Place, device: torch.device, *, at_once: int = 1) -> tuple[Cost, Cost]:
    """Time a job's network on generated images; return its cost alone, and as one of ``at_once`` runs on the device.

    On a GPU the runs take turns in this process, as in training; on a CPU each has a process. Nothing is written.
    """
    with execution.settings(device):
        first = _TimedNetwork(job, execution, place, device)
        step, evaluation = _round_seconds([first]), first.evaluation_seconds()
        alone = Cost(first.start_seconds, step, evaluation, "timed")
        if at_once == 1:
            return alone, alone
        if device.type == "cuda":
            copies = [first, *(_TimedNetwork(job, execution, place, device) for _ in range(at_once - 1))]
            start = max(one.start_seconds for one in copies)
            return alone, Cost(start, _round_seconds(copies), at_once * evaluation, "timed")
    return alone, _slowest_of_processes(job, execution, place, device, at_once)


class _TimedNetwork:
    """A network in training on generated images, and the seconds that its start took."""

    def __init__(self, job: Job, execution: Execution, place: Place, device: torch.device) -> None:
        started = time.perf_counter()
        recipe, batch = job.recipe, EVALUATION_BATCHES[device.type]
        self.lane = Lane(device, own_stream=True)
        self.evaluated_share = (recipe.test_images or TEST_IMAGES) / batch
        self.learning_rate = recipe.learning_rate
        with self.lane.turn():
            classes = cifar.NUM_CLASSES[job.dataset]
            data = cifar.generate(classes, train=recipe.batch_size, test=batch).to(device)
            self.plan = self.lane.copy(cifar.epoch_plan(0, 0, recipe.batch_size, pad=recipe.pad, flip=recipe.flip))
            model = MODELS[job.model](classes, disable=job.disable)
            model.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # the stub lacks memory_format
            self.step = TrainingStep(model, recipe, data, execution)
            self.step.prepare(self.plan, recipe.learning_rate)
            self.evaluation = Evaluation(model, data, execution)
            self.evaluation.prepare()
            self.launch()  # the first step of a process is slower
            self.wait()
        reading = READING_SECONDS.get(cifar.whereabouts(place.data), READING_SECONDS["files"])
        self.start_seconds = reading + time.perf_counter() - started

    def launch(self) -> None:
        """Launch a step; wait if the GPU is too many steps behind."""
        with self.lane.turn():
            self.step(self.plan, self.learning_rate)
            event = self.lane.launched()
        if event is not None:
            event.synchronize()

    def wait(self) -> None:
        """Wait for all steps."""
        with self.lane.turn():
            self.step.totals.tolist()

    def evaluation_seconds(self) -> float:
        """Return the seconds of an evaluation, estimated from one of its batches."""
        started = time.perf_counter()
        with self.lane.turn():
            for _ in self.evaluation.turns():
                pass
            self.evaluation.totals.tolist()
        return (time.perf_counter() - started) * self.evaluated_share


def _round_seconds(copies: list[_TimedNetwork]) -> float:
    """Return the seconds in which each copy makes a step."""
    started, rounds = time.perf_counter(), 0
    while rounds == 0 or time.perf_counter() - started < TIMED_SECONDS:
        for one in copies:
            one.launch()
        rounds += 1
    for one in copies:
        one.wait()
    return (time.perf_counter() - started) / rounds


_barrier: Barrier | None = None  # shared by the processes that time a network at the same time


def _slowest_of_processes(job: Job, execution: Execution, place: Place, device: torch.device, count: int) -> Cost:
    """Time a job in ``count`` processes at once; return the cost of the slowest, part by part."""
    context = multiprocessing.get_context("spawn")
    arguments = (context.Barrier(count), torch.get_num_threads())
    with ProcessPoolExecutor(count, context, initializer=_join, initargs=arguments) as pool:
        costs = list(pool.map(_timed_beside_others, [(job, execution, place, device)] * count))
    parts = ("start_seconds", "step_seconds", "evaluation_seconds")
    return Cost(**{name: max(getattr(cost, name) for cost in costs) for name in parts}, source="timed")


def _join(barrier: Barrier, threads: int) -> None:
    global _barrier
    _barrier = barrier
    torch.set_num_threads(threads)


def _timed_beside_others(arguments: tuple[Job, Execution, Place, torch.device]) -> Cost:
    assert _barrier is not None, "each process of the pool was given the barrier when it started"
    _barrier.wait()  # until each process has one of the tasks, so that all compute at the same time
    return timed(*arguments)[0]
