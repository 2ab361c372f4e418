"""One update of a model: a batch is put together, the loss differentiated, the weights moved, the metrics added up.

All of it happens on the training device, and nothing of it waits for the device: metrics are read at evaluations.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn import data as cifar
from memcnn.training.execution import Execution
from memcnn.training.graph import captured
from memcnn.training.recipe import Recipe

FUSED_DEVICES = ("cpu", "cuda")  # where PyTorch has an SGD in one pass over the weights


class TrainingStep:
    """Called once an iteration with the part of the epoch's plan that is its batch, and the learning rate.

    totals: (2,) float64, loss and right answers summed since somebody zeroed it.
    bad: (2,) float64, the first iteration whose loss was no number, counted from 1, and that loss; zeros before.
    forward: what is run instead of `model` itself, with the same weights.
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
        if execution.compile:
            self.forward = torch.compile(self.forward)
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

    def state_dict(self) -> dict:
        """The optimizer's state, in the form that every execution has in common."""
        state = self.optimizer.state_dict()
        return {**state, "param_groups": [{**group, "lr": float(group["lr"])} for group in state["param_groups"]]}

    def load_state_dict(self, state: dict, *, iteration: int) -> None:
        """Take up the weights' momentum and the learning rate; how updates are executed stays as it is here."""
        own = [{name: group[name] for name in ("lr", "fused")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        for group, options in zip(self.optimizer.param_groups, own, strict=True):
            group.update(options)
        self._set_learning_rate(learning_rate)
        self.iteration.fill_(iteration)

    def __call__(self, batch: cifar.EpochPlan, learning_rate: float) -> None:
        self._set_learning_rate(learning_rate)
        if not self.execution.graph:
            self.batch = batch
        elif self.batch is None:
            self.batch = batch.clone()
            self.run = captured(self.update, self._state())
        else:
            self.batch.copy_(batch)
        self.run()

    def update(self) -> None:
        """The step on `batch`, in place."""
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

    def _set_learning_rate(self, value: float) -> None:
        if self.learning_rate is not None:
            self.learning_rate.fill_(value)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = value

    def _state(self) -> list[Tensor]:
        """All that an update changes. A momentum of zeros makes the first update the same as none does."""
        state = [*self.model.parameters(), *self.model.buffers(), self.totals, self.bad, self.iteration]
        for group in self.optimizer.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:
                    if self.optimizer.state[parameter].get("momentum_buffer") is None:
                        self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
                    state.append(self.optimizer.state[parameter]["momentum_buffer"])
        return state
