"""One update of a model, and one evaluation of it, on the training device, in such a way that nothing waits for it.

``TrainingStep`` puts a batch together, differentiates the loss, moves the weights and adds up the metrics.
``Evaluation`` adds up loss and right answers on the test images. Their metrics stay on the device until somebody reads
them. Both can be captured as CUDA graphs, on the caller's current stream.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn import data as cifar
from memcnn.kernels import use_narrow_convolutions
from memcnn.training.compilation import compiled, quiet
from memcnn.training.execution import Execution
from memcnn.training.graph import captured
from memcnn.training.recipe import Recipe

FUSED_DEVICES = ("cpu", "cuda")  # where PyTorch has an SGD in one pass over the weights
EVALUATION_BATCHES = {"cuda": 1000, "cpu": 200}
"""Images of an evaluation's batch: a GPU needs many to be busy, and a CPU should be able to stop between them."""


class TrainingStep:
    """Train a model. Call it once an iteration with the learning rate and the batch, which is a part of a plan.

    Attributes:
        totals: (2,) float64, loss and right answers, summed since somebody zeroed it.
        bad: (2,) float64, the first iteration with a loss that is not finite, counted from 1, and that loss; zeros
            before.
        preparation: what `prepare` has yet to do, in words for the user: "compiling", "capturing", "compiling and
            capturing"; empty when there is nothing to do.

    Args:
        model: in training mode, on the device of ``data``.
        recipe: the recipe; only its optimizer and its padding matter here.
        data: the images.
        execution: how to execute the step; its ``settings`` must be in force whenever the step is called.
        forward: what to call instead of ``model`` itself, with the same weights.
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
        if execution.compile:
            self.forward = compiled(model, self.forward)
        self.device = data.mean.device
        # a captured step reads its learning rate from the device, any other one is given a number
        self.learning_rate = torch.zeros((), device=self.device) if execution.graph else None
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=recipe.learning_rate if self.learning_rate is None else self.learning_rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            fused=self.device.type in FUSED_DEVICES,
        )
        self.totals, self.bad = torch.zeros(2, 2, dtype=torch.float64, device=self.device)
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
        """Load the weights' momentum and the learning rate; how updates are executed stays as it is here."""
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
        """Compile and capture the step where its execution asks for that, and leave all else as it was.

        This takes up to minutes. The first call of the step does it where nobody has called ``prepare`` before. Load a
        state first: afterwards the step has to be captured again, with the momentum tensors that were loaded.

        Args:
            batch: a part of an epoch's plan of the size of all others.
            learning_rate: any; it is restored by the next call of the step.
        """
        if not self.preparation:
            return
        self._set_learning_rate(learning_rate)
        self.batch = batch.clone()
        with quiet():
            if self.execution.graph:
                self.run = captured(self.update, self._state())
            else:
                self._try()
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
        images, labels = cifar.batch(self.data, self.batch, pad=self.pad)
        images = images.contiguous(memory_format=torch.channels_last)
        with self.execution.autocast(self.device):
            logits = self.forward(images)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

        loss = loss.detach()
        self.iteration += 1
        self.totals += torch.stack([loss, (logits.detach().argmax(1) == labels).sum()])
        found = torch.stack([self.iteration, loss])
        self.bad.copy_(torch.where((self.bad[0] == 0) & ~loss.isfinite(), found, self.bad))

    def _try(self) -> None:
        """Update once, and undo it."""
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
        """Return all that an update changes. Momenta of zeros make the first update the same as without momenta."""
        state = [*self.model.parameters(), *self.model.buffers(), self.totals, self.bad, self.iteration]
        for group in self.optimizer.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:
                    if self.optimizer.state[parameter].get("momentum_buffer") is None:
                        self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                    state.append(self.optimizer.state[parameter]["momentum_buffer"])
        return state


class Evaluation:
    """Evaluate a model on the test images, in turns of one batch, so that other work can go on between them.

    ::

        for done in evaluation.turns():  # a batch is launched at each turn; nothing waits for the device
            ...
        loss, correct = evaluation.totals.tolist()  # waits for it

    A captured evaluation has a graph of a full batch, captured at the first turn (or by ``prepare``) and replayed for
    each full batch. A smaller last batch is evaluated without the graph. Compiled code is for training: an evaluation
    runs the modules as they are, because compiling a forward pass alone takes longer than it would save.

    Attributes:
        count: how many of the test images there are to evaluate, over all processes.
        totals: (2,) float64, summed loss in nats, and right answers, of the images evaluated so far by this process.

    Args:
        model: on the device of ``data``; it is in evaluation mode during the turns alone, and then as it was.
        data: the images.
        execution: how to execute it; its ``settings`` must be in force during the turns.
        images: how many test images to evaluate, from the first; None for all.
        batch: images of a batch; None for the usual number on this device.
        share: the part of n images of a batch that this process evaluates.
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
        self.rows = self.all_rows[mine].clone()  # what the graph evaluates
        self.replay: Callable[[], None] | None = None

    @property
    def preparation(self) -> str:
        """The work that ``prepare`` has yet to do, as text for the user; empty if there is none."""
        return "capturing" if self.execution.graph and self.replay is None else ""

    def prepare(self) -> None:
        """Capture the evaluation of a batch where the execution asks for that; totals and model stay as they are."""
        if self.preparation:
            with self._evaluating():
                self.replay = captured(lambda: self._add(self.rows), [self.totals])

    def turns(self) -> Generator[int, None, None]:
        """Launch the evaluation of a batch at each turn, and yield the number of images that are launched by then.

        The totals start from zero. Closing the iterator early puts the model back into its mode as well.
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
        """Evaluate all images without pause; return mean loss (nats) and accuracy (percent) of this process's share."""
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
        """Within this context no code is compiled, nor compiled code used."""
        return torch.compiler.set_stance("force_eager") if self.execution.compile else nullcontext()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)
