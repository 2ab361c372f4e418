"""A run in memory: the steps of training, its evaluations, and what is written about them.

All randomness comes from the seed: the initial weights from torch's generator seeded with it, the order, crops and
flips of an epoch from the counter (seed, epoch). A checkpoint therefore needs no generator state.
"""

import copy
import csv
import io
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.testing.memory import measure_step_memory
from memcnn.training import checkpoint, record
from memcnn.training.distributed import World
from memcnn.training.environment import device_info, git_state, software_versions
from memcnn.training.execution import Execution
from memcnn.training.files import write_by_rename
from memcnn.training.progress import Progress
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord, Segment
from memcnn.training.state import State
from memcnn.training.step import Evaluation, TrainingStep
from memcnn.training.stopping import Stop
from memcnn.training.tensorboard import TensorBoard
from memcnn.training.turns import Clock, Lane, Turns

COLUMNS = ("iteration", "epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy", "train_seconds")
CHECKPOINT_SECONDS = 20.0
"""Time between two checkpoints of a run in training, apart from those after evaluations."""
CHECKPOINT_SHARE = 0.03
"""Where saving is slow, checkpoints are written less often, so that they take at most this share of the time."""
CHECKPOINT_DUE = "a checkpoint is due"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the runs of a process have in common.

    Attributes:
        device: the device that trains.
        execution: how steps are executed there; its settings are in force.
        world: the processes that share each batch.
        stop: the stop of all runs.
        clock: the clock of training time.
        shared_by: how many runs share the device at least; more if more than that are `running` here.
        shown: whether progress is shown.
        running: the runs that are under way in this process.
        images: the images on the device, by data set and where they are from, which all runs read. They stay until the
            last run has ended. Copying them waits for the copy, so that every stream may read them afterwards.
    """

    device: torch.device
    execution: Execution
    world: World
    stop: Stop
    clock: Clock = field(default_factory=Clock)
    shared_by: int = 1
    shown: bool = False
    running: list["Run"] = field(default_factory=list)
    images: dict[tuple, cifar.Data] = field(default_factory=dict)


class Run:
    """A run in memory: model, training step, counters, and the rows of its curve.

    With several processes each has a Run, and all go through it in step. Only rank 0 reads and writes the folder; curve
    and counters are the same in all.

    Args:
        folder: the run's folder, locked.
        identity: what makes the run this run; its checkpoint must have the same.
        recipe: what to compute.
        data: the images, on the training device.
        setting: what the run has in common with the others of this process.
        lane: where the work of the run goes.
        allow_mixed: go on even where the run was executed differently so far.
    Raises:
        BadCheckpoint: when the folder holds another run, or a checkpoint that cannot be read.
        MixedExecution: when the run was executed differently so far.
    """

    def __init__(
        self, folder: Path, identity: dict, recipe: Recipe, data: cifar.Data, setting: Setting, lane: Lane,
        *, allow_mixed: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.recipe, self.data, self.setting, self.lane = folder, recipe, data, setting, lane
        self.device, self.world = setting.device, setting.world
        self.identity = {**identity, "data checksums": data.checksums}
        if self.world.size > 1 and not setting.execution.sync_batch_norm:
            self.identity["images that BatchNorm sees"] = recipe.batch_size // self.world.size
        self.batches = len(data.train_images) // recipe.batch_size  # of an epoch; the remainder is left out
        self.plan_epoch, self.plan = None, None
        self.save_seconds = 1.0  # what a stop allows for a checkpoint; a guess until the first
        self.checkpoint_seconds = 0.0  # what the last checkpoint took
        self.saved_at, self.saved_iteration = time.monotonic(), -1

        saved = self.world.from_first(lambda: checkpoint.load(folder, self.identity, device="cpu"))
        here = self._segment_from(0 if saved is None else saved["iteration"])
        if saved is not None:
            self.state = State.from_checkpoint(saved, written=self.world.from_first(self._written), here=here)
            self.state.begin(here, allow_mixed=allow_mixed)
            self.state.interruptions += 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(identity["seed"])
            self.model = MODELS[identity["model"]](data.num_classes, disable=not identity["engine"])
        # on a CPU a step takes a fifth less time with the channels innermost, and a GPU's fast kernels want them there
        self.model.to(self.device, memory_format=torch.channels_last).train()
        if saved is None:
            started = time.perf_counter()
            self.state = State(memory=self._measure_memory(), step_seconds=time.perf_counter() - started)
            self.state.begin(here, allow_mixed=False)
        self.training_step = TrainingStep(
            self.model, recipe, data, setting.execution, forward=self.world.spread(self.model, setting.execution)
        )
        if saved is not None:
            self._load(saved)
        self.evaluation = Evaluation(
            self.model, data, setting.execution, images=recipe.test_images, share=self.world.share
        )
        self.progress = Progress(
            folder.name,
            iterations=recipe.iterations,
            done=self.state.iteration,
            batch_size=recipe.batch_size,
            shown=setting.shown and self.world.is_first,
        )
        self.writer = None
        if self.world.is_first:
            self.writer = TensorBoard(folder / "tensorboard", first=self.state.last_evaluation + 1)

    def _segment_from(self, iteration: int) -> Segment:
        versions = software_versions().items()
        return Segment(
            first=iteration,
            last=iteration,
            execution=str(self.setting.execution),
            device={**device_info(self.device), "count": self.world.size},
            software={name: value and str(value) for name, value in versions},  # torch's own type cannot be saved
            **git_state(),
            shared_by=self.setting.shared_by,
            train_seconds=0.0,
        )

    def _written(self) -> RunRecord | None:
        try:
            return record.load(self.folder)
        except record.BadRecord:
            return None

    def _measure_memory(self) -> dict:
        model = copy.deepcopy(self.model)
        images, labels = cifar.batch(self.data, self._batch_plan(0), pad=self.recipe.pad)
        images = images.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            with self.setting.execution.autocast(self.device):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()

        return asdict(measure_step_memory(model, step))

    def _load(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.training_step.load_state_dict(saved["optimizer"], iteration=self.state.iteration)
        if self.world.is_first:  # it is the sum over all processes
            self.training_step.totals.copy_(saved["window"])

    def turns(self) -> Turns[RunRecord]:
        """Train from where the run is to its end or its stop."""
        try:
            with self._under_way():
                if self.state.interruptions:
                    self.progress.say(f"Going on from iteration {self.state.iteration} in {self.folder}")
                if self.state.last_evaluation < self.recipe.iterations and (reason := (yield from self._prepare())):
                    return self._write_record("partial", reason)
                while self.state.last_evaluation < self.recipe.iterations:
                    reason = (yield from self._train_to_next_evaluation()) or (yield from self._evaluate())
                    yield from self._save()
                    if reason:
                        return self._write_record("partial", reason)
                    if self.state.iteration < self.recipe.iterations:
                        self._write_record("partial", None)
                return self._write_record("complete", None)
        except _NotFinite as fault:
            return self._write_record("failed", str(fault))

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        self.setting.running.append(self)
        try:
            yield
        finally:
            self.setting.running.remove(self)
            if self.writer is not None:
                self.writer.close()
            self.progress.close()

    def _prepare(self) -> Turns[str | None]:
        """Compile and capture where the execution asks for it; return why the run had to stop instead, if it had to.

        Nothing has been trained yet, so that a stop in between loses nothing. Ctrl-C may reach the compiler's processes
        as well, and make it fail.
        """
        words = self.training_step.preparation or self.evaluation.preparation
        if not words:
            return None
        if reason := self.world.agreed(self._stop_reason(0.0)):
            return reason
        what, started = f"{words.capitalize()} {self.identity['model']}", time.perf_counter()
        self.progress.say(f"{what} ...")
        iteration = self.state.iteration
        try:
            with self.setting.clock.held():
                rate = self.recipe.learning_rate_after(iteration)
                self.training_step.prepare(self._batch_plan(iteration), rate)
                self.evaluation.prepare()
        except Exception:
            if self.world.size == 1 and (reason := self._stop_reason(0.0)):
                return reason
            raise
        yield self.lane.mark()
        self.progress.say(f"{what}: {time.perf_counter() - started:.0f} s")
        return None

    def _train_to_next_evaluation(self) -> Turns[str | None]:
        """Train, and write a checkpoint now and then; return why the run had to stop before, None if it did not."""
        every = self.recipe.evaluate_every
        goal = min((self.state.last_evaluation // every + 1) * every, self.recipe.iterations)
        while (reason := (yield from self._train(goal))) == CHECKPOINT_DUE:
            yield from self._save()
            self._write_record("partial", None)
        return reason

    def _train(self, goal: int) -> Turns[str | None]:
        """Train until `goal` iterations are done; return what had to interrupt it before. Counts the training time."""
        clock, state, reason = self.setting.clock, self.state, None
        since, shared_by = clock.now(), 1
        try:
            while state.iteration < goal and reason is None:
                if reason := self._interruption(1.5 * state.step_seconds):
                    break
                started = clock.now()
                looked = self.step()
                shared_by = max(shared_by, len(self.setting.running))
                if looked and self.device.type != "cpu" and self.world.size == 1:
                    yield self.lane.mark()
                    self.check_losses()
                if looked:
                    self.progress.show(state.iteration, **self._shown_values())
                yield self.lane.launched()
                state.step_seconds = max(clock.now() - started, 0.9 * state.step_seconds)
            yield self.lane.mark()
            return reason
        finally:
            state.count(seconds=clock.now() - since, shared_by=shared_by)

    def _batch_plan(self, iteration: int) -> cifar.EpochPlan:
        """Return what happens to the images that this process has in an iteration."""
        epoch, index = divmod(iteration, self.batches)
        recipe = self.recipe
        if epoch != self.plan_epoch:
            seed, images = self.identity["seed"], len(self.data.train_images)
            plan = cifar.epoch_plan(seed, epoch, images, pad=recipe.pad, flip=recipe.flip)
            self.plan, self.plan_epoch = self.lane.copy(plan), epoch
        first, share = index * recipe.batch_size, self.world.share(recipe.batch_size)
        return self.plan.part(first + share.start, first + share.stop)

    def step(self) -> bool:
        """Launch one step; return whether it is time to look at the losses."""
        iteration = self.state.iteration
        self.training_step(self._batch_plan(iteration), self.recipe.learning_rate_after(iteration))
        self.state.iteration += 1
        if self.device.type == "cpu":
            self.check_losses()
        self.progress.step()
        return self.progress.due()

    def _shown_values(self) -> dict[str, str]:
        """Return loss and accuracy since the last evaluation, on this process's shares of the batches."""
        count = self.state.iteration - self.state.last_evaluation
        loss, correct = self.training_step.totals.tolist()
        images = count * self.recipe.batch_size / self.world.size
        values = {"loss": f"{loss / count:.3f}", "train": f"{100 * correct / images:.1f}%"}
        return values | ({"test": f"{self.state.rows[-1]['test_accuracy']:.2f}%"} if self.state.rows else {})

    def check_losses(self) -> None:
        """Raise where a loss has not been finite since the last look; the GPU must be done with all steps (rule 3)."""
        found = [bad for bad in self.world.gathered(self.training_step.bad.tolist()) if bad[0]]
        if found:
            iteration, loss = min(found)
            self.state.iteration = int(iteration) - 1
            raise _NotFinite(f"loss is {loss} at iteration {int(iteration)}")

    def _stop_reason(self, needed_seconds: float) -> str | None:
        return self.setting.stop.reason(
            needed_seconds=needed_seconds + sum(run.save_seconds for run in self.setting.running)
        )

    def _interruption(self, step_seconds: float) -> str | None:
        """Return why training must pause before a step: a stop, or a checkpoint that is due."""
        reason = self._stop_reason(step_seconds)
        if reason is None and self.world.is_first and self._checkpoint_is_due():
            reason = CHECKPOINT_DUE
        return self.world.agreed(reason)

    def _checkpoint_is_due(self) -> bool:
        between = max(CHECKPOINT_SECONDS, self.checkpoint_seconds / CHECKPOINT_SHARE)
        return time.monotonic() - self.saved_at > between and self.saved_iteration != self.state.iteration

    def _evaluate(self) -> Turns[str | None]:
        """Add a row to the curve; return why the run had to stop before that, None if it did not."""
        self.check_losses()
        self.world.take_from_first(self.model.buffers())
        count, batch = self.evaluation.count, self.evaluation.batch
        batch_seconds = self.state.step_seconds * batch / self.recipe.batch_size / 2
        batches = self.evaluation.turns()
        try:
            for _ in range(0, count, batch):
                started = self.setting.clock.now()
                if reason := self.world.agreed(self._stop_reason(batch_seconds)):
                    return reason
                next(batches)
                yield self.lane.launched()
                batch_seconds = self.setting.clock.now() - started
        finally:
            batches.close()  # which puts the model back into training mode
        yield self.lane.mark()
        loss, correct = self.world.summed(self.evaluation.totals).tolist()
        test_loss, test_accuracy = loss / count, 100 * correct / count
        if not math.isfinite(test_loss):
            raise _NotFinite(f"test loss is {test_loss} at iteration {self.state.iteration}")
        self._add_row(test_loss, test_accuracy)
        return None

    def _add_row(self, test_loss: float, test_accuracy: float) -> None:
        state = self.state
        batch_losses = self.world.summed(self.training_step.totals)[0].item() / self.world.size
        row = {
            "iteration": state.iteration,
            "epoch": state.iteration / self.batches,
            "learning_rate": self.recipe.learning_rate_after(state.iteration - 1),
            "train_loss": batch_losses / (state.iteration - state.last_evaluation),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": state.train_seconds,
        }
        if self.writer is not None:
            self.writer.add({name: row[name] for name in COLUMNS[2:-1]}, state.iteration)
        self.progress.show(state.iteration, **(self._shown_values() | {"test": f"{test_accuracy:.2f}%"}))
        state.rows.append(row)
        self.training_step.totals.zero_()

    def _save(self) -> Turns[None]:
        """Write the checkpoint, unless a weight in it is not finite."""
        yield self.lane.mark()
        started = time.perf_counter()
        self.check_losses()
        self.world.take_from_first(self.model.buffers())
        self._check_weights()
        saved = {**vars(self.state), "train_seconds": self.state.train_seconds}
        saved["window"] = self.world.summed(self.training_step.totals)
        saved |= {"model": self.model.state_dict(), "optimizer": self.training_step.state_dict()}
        if self.world.is_first:
            checkpoint.save(self.folder, self.identity, saved)
        self.checkpoint_seconds = time.perf_counter() - started
        self.save_seconds = 0.5 + self.checkpoint_seconds
        self.saved_at, self.saved_iteration = time.monotonic(), self.state.iteration

    def _check_weights(self) -> None:
        values = {name: value for name, value in self.model.state_dict().items() if value.is_floating_point()}
        finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
        for name, good in zip(values, finite, strict=True):
            if not good:
                raise _NotFinite(f"{name} is not finite after iteration {self.state.iteration}")

    def _write_record(self, status: str, reason: str | None) -> RunRecord:
        state, here = self.state, self.state.segments[-1]
        here["last"] = state.iteration  # a loss that is not finite takes iterations back
        last = state.rows[-1] if state.rows else {}
        result = RunRecord(
            **{name: self.identity[name] for name in ("model", "dataset", "seed", "engine")},
            recipe=self.recipe,
            status=status,
            reason=reason,
            iterations=state.iteration,
            test_accuracy=last.get("test_accuracy"),
            test_loss=last.get("test_loss"),
            test_iteration=last.get("iteration"),
            train_seconds=state.train_seconds,
            interruptions=state.interruptions,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            **state.memory,
            **{name: here[name] for name in ("device", "commit", "clean")},
            software={**here["software"], "execution": here["execution"]},
            data={"official": self.data.official, "checksums": self.data.checksums},
            segments=tuple(Segment.from_dict(segment) for segment in state.segments),
        )
        if self.world.is_first:
            self._write_curve()
            result.write(self.folder)
        return result

    def _write_curve(self) -> None:
        text = io.StringIO()
        curve = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        curve.writeheader()
        curve.writerows(self.state.rows)
        write_by_rename(self.folder / "curve.csv", text.getvalue().encode())


class _NotFinite(Exception):
    """Training has failed: a loss or a weight is not finite."""
