"""One update of a model, and one evaluation of it. Neither waits for the device.

``TrainingStep`` gathers a batch, differentiates the loss, updates the weights and adds up the metrics. ``Evaluation``
adds up loss and correct predictions on the test images. Their metrics stay on the device until they are read. Both can
be captured as CUDA graphs, on the caller's current stream.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn import data as cifar
from memcnn.kernels import use_fused_norms, use_narrow_convolutions
from memcnn.training.compilation import compiled, without_compiler_warnings
from memcnn.training.execution import Execution
from memcnn.training.graph import captured
from memcnn.training.recipe import Recipe

FUSED_DEVICES = ("cpu", "cuda")  # devices on which PyTorch's SGD updates all weights in one pass
EVALUATION_BATCHES = {"cuda": 1000, "cpu": 200}
"""Images of an evaluation's batch: many keep a GPU busy; few let a CPU stop soon, between two batches."""


class TrainingStep:
    """Train a model. Call it at each iteration with the batch, a part of an epoch's plan, and the learning rate.

    Attributes:
        totals: loss and number of correct predictions, float64 of shape (2,), summed until the caller sets them to 0.
        first_bad_loss: the first iteration with a loss that is not finite, counted from 1, and that loss, float64 of
            shape (2,); zeros while all losses are finite.
        preparation: the work that ``prepare`` has yet to do, as text for the user: "compiling", "capturing", "compiling
            and capturing"; empty when there is nothing to do.

    Args:
        model: in training mode, on the device of ``data``.
        recipe: the recipe; only its optimizer and its padding matter here.
        data: the images.
        execution: the execution of the step; its ``settings`` must be in force whenever the step is called.
        forward: a callable with the model's weights to call instead of ``model``, such as a wrapper around it.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        data: cifar.Data,
        execution: Execution,
        *,
        forward: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.data, self.execution, self.pad = model, data, execution, recipe.pad
        self.forward = forward or model
        if execution.narrow_convolutions:
            use_narrow_convolutions(model)
        if execution.fused_norms:
            use_fused_norms(model)
        if execution.compile:
            self.forward = compiled(model, self.forward, combine_kernels=execution.combine_kernels)
        self.device = data.mean.device
        # a captured step reads its learning rate from the device; otherwise it is a number
        self.learning_rate = torch.zeros((), device=self.device) if execution.graph else None
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.learning_rate if self.learning_rate is None else self.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=self.device.type in FUSED_DEVICES,
        )
        self.totals, self.first_bad_loss = torch.zeros(2, 2, dtype=torch.float64, device=self.device)
        self.iteration = torch.zeros((), dtype=torch.float64, device=self.device)
        self.batch: cifar.EpochPlan | None = None
        self.run = self.update
        words = {"compiling": execution.compile, "capturing": execution.graph}
        self.preparation = " and ".join(word for word, wanted in words.items() if wanted)

    def state_dict(self) -> dict:
        """Return the optimizer's state, in the form that all executions have in common."""
        state = self.optimizer.state_dict()
        return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}

    def load_state_dict(self, state: dict, *, iteration: int) -> None:
        """Load momentum buffers and learning rate; keep the execution of updates."""
        own = [{name: group[name] for name in ("lr", "fused")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        self._set_learning_rate(learning_rate)
        self.iteration.fill_(iteration)
        if self.execution.graph and not self.preparation:
            self.run, self.preparation = self.update, "capturing"

    def prepare(self, batch: cifar.EpochPlan, learning_rate: float) -> None:
        """Compile and capture the step if its execution asks for that. Weights and metrics do not change.

        This takes up to minutes. Without it, the first call of the step does the same. Load a state dict before: it
        replaces the momentum tensors, so that the step must be captured again.

        Args:
            batch: a part of an epoch's plan, of the usual batch size.
            learning_rate: any value; the next call of the step sets its own.
        """
        if not self.preparation:
            return
        self._set_learning_rate(learning_rate)
        self.batch = batch.clone()
        with without_compiler_warnings():
            if self.execution.graph:
                self.run = captured(self.update, self._state())
            else:
                self._warm_up()
        self.preparation = ""

    def __call__(self, batch: cifar.EpochPlan, learning_rate: float) -> None:
        """Launch one update, and do not wait for it."""
        self.prepare(batch, learning_rate)
        self._set_learning_rate(learning_rate)
        if self.execution.graph:
            assert self.batch is not None, "prepare() has set it"
            self.batch.copy_(batch)
        else:
            self.batch = batch
        self.run()

    def update(self) -> None:
        """Update the model on ``batch``, in place."""
        assert self.batch is not None, "prepare() has set it"
        # before forward: while parameters have gradients, blocks cannot take the direct way (memcnn/engine/direct.py)
        self.optimizer.zero_grad()
        images, labels = cifar.batch(self.data, self.batch, pad=self.pad)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.execution.autocast(self.device):
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels)
        loss.backward()
        self.optimizer.step()

        loss = loss.detach()
        self.iteration += 1
        self.totals += torch.stack([loss, (logits.detach().argmax(1) == labels).sum()])
        found = torch.stack([self.iteration, loss])
        bad = self.first_bad_loss
        bad.copy_(torch.where((bad[0] == 0) & ~loss.isfinite(), found, bad))

    def _warm_up(self) -> None:
        """Update once, so that code is compiled, and undo it."""
        state = self._state()
        before = [tensor.detach().clone() for tensor in state]
        self.update()
        with torch.no_grad():
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

    def _set_learning_rate(self, value: float) -> None:
        if self.learning_rate is not None:
            self.learning_rate.fill_(value)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = value

    def _state(self) -> list[Tensor]:
        """Return all tensors that an update changes. Missing momentum buffers become zeros, which changes no result."""
        state = [*self.model.parameters(), *self.model.buffers(), self.totals, self.first_bad_loss, self.iteration]
        for group in self.optimizer.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:
                    if self.optimizer.state[parameter].get("momentum_buffer") is None:
                        self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                    state.append(self.optimizer.state[parameter]["momentum_buffer"])
        return state


class Evaluation:
    """Evaluate a model on the test images, one batch a turn, so that other work can be done between the turns.

    ::

        for done in evaluation.turns():  # launches a batch at each turn, and does not wait for the device
            ...
        loss, correct = evaluation.totals.tolist()  # waits for the device

    A captured evaluation has a graph of a full batch, captured at the first turn (or by ``prepare``) and replayed for
    each full batch. A smaller last batch is evaluated without the graph. Compiled code is for training: an evaluation
    runs the modules as they are, because compiling a forward pass alone takes longer than it would save.

    Attributes:
        count: number of test images to evaluate, by all processes together.
        totals: summed loss in nats and number of correct predictions of the images that this process has evaluated so
            far, float64 of shape (2,).

    Args:
        model: the model, on the device of ``data``. It is in evaluation mode only during the turns.
        data: the images.
        execution: the execution of the forward pass; its ``settings`` must be in force during the turns.
        images: how many test images to evaluate, from the first; None for all.
        batch: images of a batch; None for the usual number on this device.
        share: a function that maps the number of images of a batch to the slice that this process evaluates.
    """

    def __init__(
        self,
        model: nn.Module,
        data: cifar.Data,
        execution: Execution,
        *,
        images: int | None = None,
        batch: int | None = None,
        share: Callable[[int], slice] = slice,
    ) -> None:
        self.model, self.data, self.execution, self.share = model, data, execution, share
        self.device = data.mean.device
        self.count = len(data.test_images[:images])
        self.batch = min(batch or EVALUATION_BATCHES.get(self.device.type, 200), self.count)
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.all_rows = torch.arange(self.count, device=self.device)
        mine = share(self.batch)
        self.rows = self.all_rows[mine].clone()  # indices of the images that the graph evaluates
        self.replay: Callable[[], None] | None = None

    @property
    def preparation(self) -> str:
        """The work that ``prepare`` has yet to do, as text for the user; empty if there is none."""
        return "capturing" if self.execution.graph and self.replay is None else ""

    def prepare(self) -> None:
        """Capture the evaluation of a batch if the execution asks for that. Totals and model do not change."""
        if self.preparation:
            with self._evaluating():
                self.replay = captured(lambda: self._add(self.rows), [self.totals])

    def turns(self) -> Generator[int, None, None]:
        """Launch the evaluation of a batch at each turn, and yield the number of images launched so far.

        The totals start from zero. Closing the iterator early also restores the model's mode.
        """
        self.prepare()
        self.totals.zero_()
        with self._evaluating():
            for first in range(0, self.count, self.batch):
                done = min(first + self.batch, self.count)
                part = self.share(done - first)
                rows = self.all_rows[first:done][part]
                if self.replay is not None and len(rows) == len(self.rows):
                    self.rows.copy_(rows)
                    self.replay()
                elif len(rows):
                    self._add(rows)
                yield done

    def result(self) -> tuple[float, float]:
        """Evaluate all images and return mean loss (nats) and accuracy (percent). For a single process only."""
        for _ in self.turns():
            pass
        loss, correct = self.totals.tolist()
        return loss / self.count, 100 * correct / self.count

    @torch.no_grad()
    def _add(self, rows: Tensor) -> None:
        images, labels = cifar.normalise(self.data.test_images[rows], self.data.mean), self.data.test_labels[rows]
        with self.execution.autocast(self.device), self._as_it_is():
            logits = self.model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels, reduction="sum")
        self.totals += torch.stack([loss, (logits.argmax(1) == labels).sum()])

    def _as_it_is(self) -> AbstractContextManager:
        """Return a context in which modules run uncompiled."""
        return torch.compiler.set_stance("force_eager") if self.execution.compile else nullcontext()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
