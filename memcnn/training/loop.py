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
from torch import Tensor

from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.testing.memory import measure_step_memory
from memcnn.training import checkpoint
from memcnn.training.environment import device_info, git_state, software_versions
from memcnn.training.files import write_by_rename
from memcnn.training.progress import Progress
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord
from memcnn.training.stopping import Stop
from memcnn.training.tensorboard import TensorBoard

COLUMNS = ("iteration", "epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy", "train_seconds")
STATE = ("iteration", "rows", "window", "train_seconds", "interruptions", "memory", "step_seconds")  # of a Run, saved
EVALUATION_BATCH = 200


class Run:
    """A run in memory: model, optimizer, counters, and the rows of its curve."""

    def __init__(
        self, folder: Path, identity: dict, recipe: Recipe, data: cifar.Data, device: torch.device, stop: Stop
    ) -> None:
        self.folder, self.recipe, self.data, self.device, self.stop = folder, recipe, data.to(device), device, stop
        self.identity = {**identity, "data checksums": data.checksums}
        self.source = git_state()
        self.batches = len(data.train_images) // recipe.batch_size  # an epoch, the remainder left out
        self.plan_epoch = None

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(identity["seed"])
            self.model = MODELS[identity["model"]](data.num_classes, disable=not identity["engine"])
        # on a CPU a step takes a fifth less time with the channels innermost
        self.memory_format = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        self.model.to(device, memory_format=self.memory_format).train()
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.iteration = 0
        self.rows: list[dict] = []
        self.train_seconds = 0.0
        self.interruptions = 0
        self.save_seconds = 1.0  # how long a checkpoint takes; a guess until the first
        # on the device, so that nobody waits for it: loss and right answers summed since the last row of the curve,
        # and the first iteration whose loss is no number, with that loss
        self.window, self.bad = torch.zeros(2, 2, dtype=torch.float64, device=device)

        state = checkpoint.load(folder, self.identity, device=device)
        if state is None:
            started = time.perf_counter()
            self.memory = self._measure_memory()
            self.step_seconds = time.perf_counter() - started
        else:
            self._restore(state)

    def _measure_memory(self) -> dict:
        model = copy.deepcopy(self.model)
        images, labels = self._batch(0)
        return asdict(measure_step_memory(model, lambda: F.cross_entropy(model(images), labels).backward()))

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in STATE:
            setattr(self, name, state[name])
        self.interruptions += 1

    def go(self, *, shown: bool) -> RunRecord:
        """Train from where the run is to its end or its stop."""
        self.progress = Progress(
            self.folder.name,
            iterations=self.recipe.iterations,
            done=self.iteration,
            batch_size=self.recipe.batch_size,
            shown=shown,
        )
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
                if reason := self.stop.reason(needed_seconds=1.5 * self.step_seconds + self.save_seconds):
                    return reason
                step_started = time.perf_counter()
                self._step()
                self.step_seconds = max(time.perf_counter() - step_started, 0.9 * self.step_seconds)
            return None
        finally:
            self.train_seconds += self._now() - started

    def _batch(self, iteration: int) -> tuple[Tensor, Tensor]:
        epoch, index = divmod(iteration, self.batches)
        recipe = self.recipe
        if epoch != self.plan_epoch:
            seed, images = self.identity["seed"], len(self.data.train_images)
            self.plan = cifar.epoch_plan(seed, epoch, images, pad=recipe.pad, flip=recipe.flip).to(self.device)
            self.plan_epoch = epoch
        images, labels = cifar.train_batch(self.data, self.plan, index, batch_size=recipe.batch_size, pad=recipe.pad)
        return images.contiguous(memory_format=self.memory_format), labels

    def _step(self) -> None:
        images, labels = self._batch(self.iteration)
        self.optimizer.param_groups[0]["lr"] = self.recipe.learning_rate_after(self.iteration)
        logits = self.model(images)
        loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.iteration += 1

        loss = loss.detach()
        self.window += torch.stack([loss, (logits.detach().argmax(1) == labels).sum()])
        found = torch.stack([torch.full_like(loss, self.iteration), loss])
        self.bad = torch.where((self.bad[0] == 0) & ~loss.isfinite(), found.double(), self.bad)
        look = self.progress.due()
        if look or self.device.type == "cpu":  # elsewhere this waits for the device
            self._check_losses()
        self.progress.step()
        if look:
            self.progress.show(self.iteration, **self._shown_values())

    def _shown_values(self) -> dict[str, str]:
        count = self.iteration - self._last_evaluation()
        loss, correct = self.window.tolist()
        values = {"loss": f"{loss / count:.3f}", "train": f"{100 * correct / count / self.recipe.batch_size:.1f}%"}
        return values | ({"test": f"{self.rows[-1]['test_accuracy']:.2f}%"} if self.rows else {})

    def _check_losses(self) -> None:
        iteration, loss = self.bad.tolist()
        if iteration:
            self.iteration = int(iteration) - 1
            raise _NotFinite(f"loss is {loss} at iteration {int(iteration)}")

    @torch.no_grad()
    def _evaluate(self) -> str | None:
        """Add a row to the curve; why it had to stop before that, None when it did not."""
        self._check_losses()
        images = self.data.test_images[: self.recipe.test_images]
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        batch_seconds = self.step_seconds * EVALUATION_BATCH / self.recipe.batch_size / 2
        self.model.eval()
        try:
            for first in range(0, len(images), EVALUATION_BATCH):
                started = time.perf_counter()
                if reason := self.stop.reason(needed_seconds=batch_seconds + self.save_seconds):
                    return reason
                part = images[first : first + EVALUATION_BATCH]
                labels = self.data.test_labels[first : first + len(part)]
                normalised = cifar.normalise(part, self.data.mean)
                logits = self.model(normalised.contiguous(memory_format=self.memory_format))
                loss = F.cross_entropy(logits, labels, reduction="sum")
                totals += torch.stack([loss, (logits.argmax(1) == labels).sum()])
                batch_seconds = time.perf_counter() - started
        finally:
            self.model.train()
        test_loss, test_accuracy = totals[0].item() / len(images), 100 * totals[1].item() / len(images)
        if not math.isfinite(test_loss):
            raise _NotFinite(f"test loss is {test_loss} at iteration {self.iteration}")
        self._add_row(test_loss, test_accuracy)
        return None

    def _add_row(self, test_loss: float, test_accuracy: float) -> None:
        row = {
            "iteration": self.iteration,
            "epoch": self.iteration / self.batches,
            "learning_rate": self.recipe.learning_rate_after(self.iteration - 1),
            "train_loss": self.window[0].item() / (self.iteration - self._last_evaluation()),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "train_seconds": self.train_seconds,
        }
        self.writer.add({name: row[name] for name in COLUMNS[2:-1]}, self.iteration)
        self.progress.show(self.iteration, **(self._shown_values() | {"test": f"{test_accuracy:.2f}%"}))
        self.rows.append(row)
        self.window.zero_()

    def _save(self) -> None:
        """Write the checkpoint, unless what it would hold is spoilt."""
        started = time.perf_counter()
        self._check_losses()
        for name, value in self.model.state_dict().items():
            if value.is_floating_point() and not value.isfinite().all():
                raise _NotFinite(f"{name} is not finite after iteration {self.iteration}")
        state = {name: getattr(self, name) for name in STATE}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoint.save(self.folder, self.identity, state)
        self.save_seconds = 0.5 + time.perf_counter() - started

    def _write_record(self, status: str, reason: str | None) -> RunRecord:
        text = io.StringIO()
        curve = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        curve.writeheader()
        curve.writerows(self.rows)
        write_by_rename(self.folder / "curve.csv", text.getvalue().encode())
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
            device=device_info(self.device),
            software=software_versions(),
            **self.source,
            data={"official": self.data.official, "checksums": self.data.checksums},
        )
        result.write(self.folder)
        return result

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _NotFinite(Exception):
    """Training has failed: a loss or a weight is no number."""
