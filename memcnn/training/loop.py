"""The training of a run: its steps, its evaluations, and the files that it writes.

All randomness comes from the seed. Torch's generator, seeded with it, draws the initial weights. Order, crops and flips
of an epoch depend only on (seed, epoch). A checkpoint therefore needs no generator state.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from memcnn.training import checkpoint, record
from memcnn.training.batches import Batches
from memcnn.training.finite import NotFinite, check_weights
from memcnn.training.network import new_network, step_memory
from memcnn.training.progress import Progress
from memcnn.training.record import RunRecord
from memcnn.training.results import COLUMNS, record_of, write_curve
from memcnn.training.saving import Saving
from memcnn.training.setting import Setting
from memcnn.training.starting import Start
from memcnn.training.state import State
from memcnn.training.step import Evaluation, TrainingStep
from memcnn.training.tensorboard import TensorBoard
from memcnn.training.turns import Lane, Turns

CHECKPOINT_DUE = "a checkpoint is due"


class Run:
    """A run in training: model, training step, state, and the files that it writes.

    With several processes each has a ``Run``, and all take the same steps. Only rank 0 reads and writes the folder;
    curve and counters are the same in all.

    Args:
        start: the job, its folder (locked), its identity and its images.
        setting: the setting that the run shares with the others of this process.
        lane: the run's CUDA stream, or the CPU.
    Raises:
        BadCheckpoint: the folder holds another run, or a checkpoint that cannot be read.
        MixedExecution: the run was executed differently so far, and the job does not allow that.
    """

    def __init__(self, start: Start, setting: Setting, lane: Lane) -> None:
        self.start, self.setting, self.lane = start, setting, lane
        self.identity, self.recipe, self.data = start.identity, start.job.recipe, start.images
        self.folder, self.device, self.world = start.folder, setting.device, setting.world
        self.batches = Batches(
            len(self.data.train_images), self.recipe, seed=start.job.seed, world=self.world, lane=lane
        )
        self.saving = Saving(self.folder if self.world.is_first else None, self.identity)

        saved = self.world.on_rank_0(lambda: checkpoint.load(self.folder, self.identity, device="cpu"))
        if saved is not None:
            self._resume(saved)
        self.model = new_network(start.job, self.data.num_classes, self.device)
        started = time.perf_counter()
        memory = self._measure_memory() if saved is None else saved.memory
        measured_seconds = time.perf_counter() - started
        forward = self.world.wrap_in_ddp(self.model, setting.execution)
        self.training_step = TrainingStep(self.model, self.recipe, self.data, setting.execution, forward=forward)
        if saved is not None:
            self._load_tensors(saved)
        # the measured step's time is the first estimate of a step's time
        self.state = saved or self._new_state(memory, measured_seconds)
        self.evaluation = Evaluation(
            self.model, self.data, setting.execution, images=self.recipe.test_images, share=self.world.share
        )
        self.progress = Progress(
            self.folder.name,
            iterations=self.recipe.iterations,
            done=self.state.iteration,
            batch_size=self.recipe.batch_size,
            shown=setting.shown and self.world.is_first,
        )
        self.writer = None
        if self.world.is_first:
            self.writer = TensorBoard(self.folder / "tensorboard", first=self.state.last_evaluation + 1)

    def _resume(self, state: State) -> None:
        """Resume a saved state: begin a new segment of it."""
        here = self.setting.segment_from(state.iteration)
        state.make_segment_of_old_checkpoint(written=self.world.on_rank_0(lambda: record.find(self.folder)), here=here)
        state.begin(here, allow_mixed=self.start.job.allow_mixed)
        state.interruptions += 1

    def _load_tensors(self, state: State) -> None:
        self.model.load_state_dict(state.model)
        self.training_step.load_state_dict(state.optimizer, iteration=state.iteration)
        if self.world.is_first:  # it is the sum over all processes
            self.training_step.totals.copy_(state.window)
        state.set_tensors(**self._tensors())

    def _new_state(self, memory: dict[str, int], step_seconds: float) -> State:
        state = State(memory=memory, step_seconds=step_seconds, **self._tensors())
        state.begin(self.setting.segment_from(0), allow_mixed=False)
        return state

    def _tensors(self) -> dict:
        """Return the tensors of a checkpoint as they are now."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.training_step.state_dict(),
            "window": self.world.all_reduce_sum(self.training_step.totals),
        }

    def _measure_memory(self) -> dict[str, int]:
        pad, execution = self.recipe.pad, self.setting.execution
        return step_memory(self.model, self.data, self.batches[0], pad=pad, execution=execution)

    def turns(self) -> Turns[RunRecord]:
        """Train until the recipe is done or the run is stopped, write the record, and return it."""
        try:
            with self._under_way():
                if self.state.interruptions:
                    self.progress.say(f"Resuming from iteration {self.state.iteration} in {self.folder}")
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
        except NotFinite as fault:
            return self._write_record("failed", str(fault))

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """Count this run among the running ones for as long as the context lasts, then close its displays."""
        self.setting.running.append(self)
        try:
            yield
        finally:
            self.setting.running.remove(self)
            if self.writer is not None:
                self.writer.close()
            self.progress.close()

    def _prepare(self) -> Turns[str | None]:
        """Compile and capture if the execution asks for it. Return a reason if the run must stop instead, else None.

        A stop loses nothing here, because nothing has been trained yet. Ctrl-C may also reach the compiler's processes
        and make the compilation fail.
        """
        words = self.training_step.preparation or self.evaluation.preparation
        if not words:
            return None
        if reason := self.world.first_reason(self._stop_reason(0.0)):
            return reason
        what, started = f"{words.capitalize()} {self.start.job.model}", time.perf_counter()
        self.progress.say(f"{what} ...")
        iteration = self.state.iteration
        try:
            with self.setting.clock.held():
                rate = self.recipe.learning_rate_after(iteration)
                self.training_step.prepare(self.batches[iteration], rate)
                self.evaluation.prepare()
        except Exception:
            if self.world.size == 1 and (reason := self._stop_reason(0.0)):
                return reason
            raise
        yield self.lane.mark()
        self.progress.say(f"{what}: {time.perf_counter() - started:.0f} s")
        return None

    def _train_to_next_evaluation(self) -> Turns[str | None]:
        """Train, and write checkpoints that are due. Return a reason if the run must stop before, else None."""
        every = self.recipe.evaluate_every
        goal = min((self.state.last_evaluation // every + 1) * every, self.recipe.iterations)
        while (reason := (yield from self._train(goal))) == CHECKPOINT_DUE:
            yield from self._save()
            self._write_record("partial", None)
        return reason

    def _train(self, goal: int) -> Turns[str | None]:
        """Train until ``goal`` iterations are done, and count the time. Return why to pause before that, or None."""
        clock, state, reason = self.setting.clock, self.state, None
        since, shared_by = clock.now(), 1
        try:
            while state.iteration < goal and reason is None:
                if reason := self._interruption(1.5 * state.step_seconds):  # 50 % more than a step is expected to take
                    break
                started = clock.now()
                due = self.step()
                shared_by = max(shared_by, len(self.setting.running))
                if due and self.device.type != "cpu" and self.world.size == 1:
                    yield self.lane.mark()
                    self.check_losses()
                if due:
                    self.progress.show(state.iteration, **self._shown_values())
                yield self.lane.launched()
                # after one short step the next may be long again: let the estimate fall by at most 10 %
                state.step_seconds = max(clock.now() - started, 0.9 * state.step_seconds)
            yield self.lane.mark()
            return reason
        finally:
            state.extend_last_segment(seconds=clock.now() - since, shared_by=shared_by)

    def step(self) -> bool:
        """Launch one step; return whether the display of progress is due."""
        iteration = self.state.iteration
        self.training_step(self.batches[iteration], self.recipe.learning_rate_after(iteration))
        self.state.iteration += 1
        if self.device.type == "cpu":
            self.check_losses()
        self.progress.step()
        return self.progress.due()

    def _shown_values(self) -> dict[str, str]:
        """Return loss and accuracy since the last evaluation, of this process's shares of the batches, as text."""
        count = self.state.iteration - self.state.last_evaluation
        loss, correct = self.training_step.totals.tolist()
        images = count * self.recipe.batch_size / self.world.size
        values = {"loss": f"{loss / count:.3f}", "train": f"{100 * correct / images:.1f}%"}
        return values | ({"test": f"{self.state.rows[-1]['test_accuracy']:.2f}%"} if self.state.rows else {})

    def check_losses(self) -> None:
        """Raise NotFinite if a loss was not finite. The GPU must have finished all steps (rule 3 of ``turns``)."""
        found = [bad for bad in self.world.all_gather(self.training_step.first_bad_loss.tolist()) if bad[0]]
        if found:
            iteration, loss = min(found)
            self.state.iteration = int(iteration) - 1
            raise NotFinite(f"loss is {loss} at iteration {int(iteration)}")

    def _stop_reason(self, needed_seconds: float) -> str | None:
        """Return why to stop now, or None if work of ``needed_seconds`` and the checkpoints of all runs still fit."""
        return self.setting.stop.reason(
            needed_seconds=needed_seconds + sum(run.saving.allowance_seconds for run in self.setting.running)
        )

    def _interruption(self, step_seconds: float) -> str | None:
        """Return why training must pause before a step: a stop, or a checkpoint that is due; None if it need not."""
        reason = self._stop_reason(step_seconds)
        if reason is None and self.world.is_first and self.saving.is_due(self.state.iteration):
            reason = CHECKPOINT_DUE
        return self.world.first_reason(reason)

    def _evaluate(self) -> Turns[str | None]:
        """Evaluate and add a row to the curve. Return a reason if the run must stop before, else None."""
        self.check_losses()
        self.world.broadcast_from_rank_0(self.model.buffers())
        count, batch = self.evaluation.count, self.evaluation.batch
        batch_seconds = self.state.step_seconds * batch / self.recipe.batch_size / 2
        batches = self.evaluation.turns()
        try:
            for _ in range(0, count, batch):
                started = self.setting.clock.now()
                if reason := self.world.first_reason(self._stop_reason(batch_seconds)):
                    return reason
                next(batches)
                yield self.lane.launched()
                batch_seconds = self.setting.clock.now() - started
        finally:
            batches.close()  # puts the model back into training mode
        yield self.lane.mark()
        loss, correct = self.world.all_reduce_sum(self.evaluation.totals).tolist()
        test_loss, test_accuracy = loss / count, 100 * correct / count
        if not math.isfinite(test_loss):
            raise NotFinite(f"test loss is {test_loss} at iteration {self.state.iteration}")
        self._add_row(test_loss, test_accuracy)
        return None

    def _add_row(self, test_loss: float, test_accuracy: float) -> None:
        """Add a row to the curve, and begin the sums of the next one."""
        state = self.state
        batch_losses = self.world.all_reduce_sum(self.training_step.totals)[0].item() / self.world.size
        row = {
            "iteration": state.iteration,
            "epoch": state.iteration / self.batches.per_epoch,
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
        self.world.broadcast_from_rank_0(self.model.buffers())
        check_weights(self.model, self.state.iteration)
        self.state.set_tensors(**self._tensors())
        self.saving.save(self.state, started=started)

    def _write_record(self, status: str, reason: str | None) -> RunRecord:
        """Write record and curve; return the record."""
        self.state.extend_last_segment(seconds=0.0, shared_by=1)  # check_losses() may have set the iteration back
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        result = record_of(
            self.state, self.identity, self.recipe, self.data, parameters=parameters, outcome=(status, reason)
        )
        if self.world.is_first:
            write_curve(self.folder, self.state.rows)
            result.write(self.folder)
        return result
