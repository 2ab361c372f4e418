"""A run in memory: the steps of training, its evaluations, and what is written about them.

What is random comes from the seed alone: the initial weights from torch's generator seeded with it, the order, crops
and flips of an epoch from the counter (seed, epoch). A checkpoint therefore needs no generator state.
"""

import copy
import csv
import io
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.testing.memory import measure_step_memory
from memcnn.training import checkpoint
from memcnn.training.distributed import World
from memcnn.training.environment import device_info, git_state, software_versions
from memcnn.training.execution import Execution
from memcnn.training.files import write_by_rename
from memcnn.training.progress import Progress
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord
from memcnn.training.step import TrainingStep
from memcnn.training.stopping import Stop
from memcnn.training.tensorboard import TensorBoard

COLUMNS = ("iteration", "epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy", "train_seconds")
STATE = ("iteration", "rows", "train_seconds", "interruptions", "memory", "step_seconds")  # of a Run, saved
EVALUATION_BATCH = 200


class Run:
    """A run in memory: model, training step, counters, and the rows of its curve.

    In a world of several processes each has a Run, and all go through it in step. Only the first reads and writes the
    folder; curve and counters are the same in all.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict,
        recipe: Recipe,
        data: cifar.Data,
        device: torch.device,
        stop: Stop,
        *,
        execution: Execution,
        world: World,
    ) -> None:
        self.folder, self.recipe, self.data, self.device, self.stop = folder, recipe, data.to(device), device, stop
        self.execution, self.world = execution, world
        self.identity = {**identity, "data checksums": data.checksums}
        if world.size > 1 and not execution.sync_batch_norm:
            self.identity["images that BatchNorm sees"] = recipe.batch_size // world.size
        self.source = git_state()
        self.batches = len(data.train_images) // recipe.batch_size  # an epoch, the remainder left out
        self.plan_epoch = None

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(identity["seed"])
            self.model = MODELS[identity["model"]](data.num_classes, disable=not identity["engine"])
        # on a CPU a step takes a fifth less time with the channels innermost, and a GPU's fast kernels want them there
        self.model.to(device, memory_format=torch.channels_last).train()
        self.iteration = 0
        self.rows: list[dict] = []
        self.train_seconds = 0.0
        self.interruptions = 0
        self.save_seconds = 1.0  # how long a checkpoint takes; a guess until the first

        state = world.from_first(lambda: checkpoint.load(folder, self.identity, device="cpu"))
        if state is None:
            started = time.perf_counter()
            self.memory = self._measure_memory()
            self.step_seconds = time.perf_counter() - started
        self.step = TrainingStep(
            self.model, recipe, self.data, execution, forward=world.spread(self.model, execution)
        )
        if state is not None:
            self._restore(state)

    def _measure_memory(self) -> dict:
        model = copy.deepcopy(self.model)
        images, labels = cifar.batch(self.data, self._batch_plan(), pad=self.recipe.pad)
        images = images.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            with self.execution.autocast(self.device):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()

        return asdict(measure_step_memory(model, step))

    def _restore(self, state: dict) -> None:
        for name in STATE:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.step.load_state_dict(state["optimizer"], iteration=self.iteration)
        if self.world.is_first:  # it is the sum over all processes
            self.step.totals.copy_(state["window"])
        self.interruptions += 1

    def go(self, *, shown: bool) -> RunRecord:
        """Train from where the run is to its end or its stop."""
        self.progress = Progress(
            self.folder.name,
            iterations=self.recipe.iterations,
            done=self.iteration,
            batch_size=self.recipe.batch_size,
            shown=shown and self.world.is_first,
        )
        self.writer = None
        if self.world.is_first:
            self.writer = TensorBoard(self.folder / "tensorboard", first=self._last_evaluation() + 1)
        if self.interruptions:
            self.progress.say(f"Going on from iteration {self.iteration} in {self.folder}")
        try:
            while self._last_evaluation() < self.recipe.iterations:
                reason = self._train_to_next_evaluation() or self._evaluate()
                self._save()
                if reason:
                    return self._write_record("partial", reason)
                if self.iteration < self.recipe.iterations:
                    self._write_record("partial", None)
            return self._write_record("complete", None)
        except _NotFinite as fault:
            return self._write_record("failed", str(fault))
        finally:
            if self.writer is not None:
                self.writer.close()
            self.progress.close()

    def _last_evaluation(self) -> int:
        return self.rows[-1]["iteration"] if self.rows else 0

    def _train_to_next_evaluation(self) -> str | None:
        """Why it had to stop before, None when it did not. Counts the training time."""
        every = self.recipe.evaluate_every
        goal = min((self._last_evaluation() // every + 1) * every, self.recipe.iterations)
        started = self._now()
        try:
            while self.iteration < goal:
                if reason := self._stop_reason(1.5 * self.step_seconds + self.save_seconds):
                    return reason
                step_started = time.perf_counter()
                self._step()
                self.step_seconds = max(time.perf_counter() - step_started, 0.9 * self.step_seconds)
            return None
        finally:
            self.train_seconds += self._now() - started

    def _batch_plan(self) -> cifar.EpochPlan:
        """What happens to the images that this process has in the next iteration."""
        epoch, index = divmod(self.iteration, self.batches)
        recipe = self.recipe
        if epoch != self.plan_epoch:
            seed, images = self.identity["seed"], len(self.data.train_images)
            self.plan = cifar.epoch_plan(seed, epoch, images, pad=recipe.pad, flip=recipe.flip).to(self.device)
            self.plan_epoch = epoch
        first, share = index * recipe.batch_size, self.world.share(recipe.batch_size)
        return self.plan.part(first + share.start, first + share.stop)

    def _step(self) -> None:
        self.step(self._batch_plan(), self.recipe.learning_rate_after(self.iteration))
        self.iteration += 1
        look = self.progress.due()
        if self.device.type == "cpu" or (look and self.world.size == 1):  # elsewhere this waits for the device
            self._check_losses()
        self.progress.step()
        if look:
            self.progress.show(self.iteration, **self._shown_values())

    def _shown_values(self) -> dict[str, str]:
        """Loss and accuracy since the last evaluation, on this process's shares of the batches."""
        count = self.iteration - self._last_evaluation()
        loss, correct = self.step.totals.tolist()
        images = count * self.recipe.batch_size / self.world.size
        values = {"loss": f"{loss / count:.3f}", "train": f"{100 * correct / images:.1f}%"}
        return values | ({"test": f"{self.rows[-1]['test_accuracy']:.2f}%"} if self.rows else {})

    def _check_losses(self) -> None:
        found = [bad for bad in self.world.gathered(self.step.bad.tolist()) if bad[0]]
        if found:
            iteration, loss = min(found)
            self.iteration = int(iteration) - 1
            raise _NotFinite(f"loss is {loss} at iteration {int(iteration)}")

    def _stop_reason(self, needed_seconds: float) -> str | None:
        return self.world.agreed(self.stop.reason(needed_seconds=needed_seconds))

    @torch.no_grad()
    def _evaluate(self) -> str | None:
        """Add a row to the curve; why it had to stop before that, None when it did not."""
        self._check_losses()
        self.world.take_from_first(self.model.buffers())
        images = self.data.test_images[: self.recipe.test_images]
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        batch_seconds = self.step_seconds * EVALUATION_BATCH / self.recipe.batch_size / 2
        self.model.eval()
        try:
            for first in range(0, len(images), EVALUATION_BATCH):
                started = time.perf_counter()
                if reason := self._stop_reason(batch_seconds + self.save_seconds):
                    return reason
                part = self.world.share(min(EVALUATION_BATCH, len(images) - first))
                if part.start < part.stop:
                    totals += evaluated(
                        self.model, self.data, slice(first + part.start, first + part.stop), self.execution
                    )
                batch_seconds = time.perf_counter() - started
        finally:
            self.model.train()
        loss, correct = self.world.summed(totals).tolist()
        test_loss, test_accuracy = loss / len(images), 100 * correct / len(images)
        if not math.isfinite(test_loss):
            raise _NotFinite(f"test loss is {test_loss} at iteration {self.iteration}")
        self._add_row(test_loss, test_accuracy)
        return None

    def _add_row(self, test_loss: float, test_accuracy: float) -> None:
        batch_losses = self.world.summed(self.step.totals)[0].item() / self.world.size
        row = {
            "iteration": self.iteration,
            "epoch": self.iteration / self.batches,
            "learning_rate": self.recipe.learning_rate_after(self.iteration - 1),
            "train_loss": batch_losses / (self.iteration - self._last_evaluation()),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": self.train_seconds,
        }
        if self.writer is not None:
            self.writer.add({name: row[name] for name in COLUMNS[2:-1]}, self.iteration)
        self.progress.show(self.iteration, **(self._shown_values() | {"test": f"{test_accuracy:.2f}%"}))
        self.rows.append(row)
        self.step.totals.zero_()

    def _save(self) -> None:
        """Write the checkpoint, unless what it would hold is spoilt."""
        started = time.perf_counter()
        self._check_losses()
        self.world.take_from_first(self.model.buffers())
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise _NotFinite(f"{name} is not finite after iteration {self.iteration}")
        state = {name: getattr(self, name) for name in STATE}
        state["window"] = self.world.summed(self.step.totals)
        state |= {"model": self.model.state_dict(), "optimizer": self.step.state_dict()}
        if self.world.is_first:
            checkpoint.save(self.folder, self.identity, state)
        self.save_seconds = 0.5 + time.perf_counter() - started

    def _write_record(self, status: str, reason: str | None) -> RunRecord:
        last = self.rows[-1] if self.rows else {}
        result = RunRecord(
            **{name: self.identity[name] for name in ("model", "dataset", "seed", "engine")},
            recipe=self.recipe,
            status=status,
            reason=reason,
            iterations=self.iteration,
            test_accuracy=last.get("test_accuracy"),
            test_loss=last.get("test_loss"),
            test_iteration=last.get("iteration"),
            train_seconds=self.train_seconds,
            interruptions=self.interruptions,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            **self.memory,
            device={**device_info(self.device), "count": self.world.size},
            software={**software_versions(), "execution": str(self.execution)},
            **self.source,
            data={"official": self.data.official, "checksums": self.data.checksums},
        )
        if self.world.is_first:
            self._write_curve()
            result.write(self.folder)
        return result

    def _write_curve(self) -> None:
        text = io.StringIO()
        curve = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        curve.writeheader()
        curve.writerows(self.rows)
        write_by_rename(self.folder / "curve.csv", text.getvalue().encode())

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def evaluated(model: nn.Module, data: cifar.Data, part: slice, execution: Execution) -> Tensor:
    """(2,): summed loss, and right answers, on a part of the test images."""
    images, labels = cifar.normalise(data.test_images[part], data.mean), data.test_labels[part]
    with execution.autocast(images.device):
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, (logits.argmax(1) == labels).sum()])


class _NotFinite(Exception):
    """Training has failed: a loss or a weight is no number."""
