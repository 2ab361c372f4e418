"""Faults of user code that runs in our engine: couplings, options, branches and a wrapper of their own."""

from functools import partial

from torch import Tensor, nn

from memcnn import AdditiveCoupling, AffineCoupling, InvertibleModuleWrapper
from memcnn.engine.couple import couple
from memcnn.models.affine import scale
from properties.support.blocks import Notes
from properties.zoo.gradients import DIFFERENCES, INPUTS
from properties.zoo.inverse_blocks import Additive, affine
from properties.zoo.inverses import FORTH
from properties.zoo.specimen import Own, branch, dropping, fault


def plus(a: Tensor, h: Tensor) -> Tensor:
    return a + h


def minus(a: Tensor, h: Tensor) -> Tensor:
    return a - h


class UndoneByItself(Additive):
    """Passes the sum to the engine as its own inverse."""

    def couple(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = couple(x1, self.Fm, x2, forward=plus, inverse=minus)
        return y1, couple(x2, self.Gm, y1, forward=plus, inverse=plus)


class ScaleNotUndone(AffineCoupling):
    """Passes an inverse to the engine that undoes only the shift, not the scale."""

    def couple(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = couple(x1, self.Fm, x2, forward=scale, inverse=shift_undone)
        return y1, couple(x2, self.Gm, y1, forward=scale, inverse=shift_undone)


def shift_undone(a: Tensor, h: tuple[Tensor, Tensor]) -> Tensor:
    return a - h[1]


class HiddenState(nn.Module):
    """A branch with a running mean that is no buffer, so that the recomputation starts from another mean."""

    def __init__(self):
        super().__init__()
        self.branch = branch()
        self.mean = Notes([0.0])  # a number or a plain list would be set back for the recomputation

    def forward(self, x: Tensor) -> Tensor:
        self.mean[0] = 0.5 * self.mean[0] + 0.5 * x.detach().mean().item() + 0.5
        return self.branch(x) * (1 + self.mean[0])


class UndoIsForward(InvertibleModuleWrapper):
    """Passes ``forward`` to the engine as the inverse, too."""

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self._fn, self._fn.forward, (x,), {}, self.keep_input)


class OutputDetached(InvertibleModuleWrapper):
    """Adds a copy of the output as a skip that is meant for logging."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 2 * y - y.detach()


FAULTS = [
    fault(
        "a sum undone by a sum",
        "the step given to couple for the inverse",
        UndoneByItself,
        "gradients",
        INPUTS,
        "the gradient of the input",
    ),
    fault(
        "a scale not undone",
        "the step given to couple undoes the shift alone",
        partial(affine, ScaleNotUndone),
        "gradients",
        INPUTS,
        "the gradient of the input",
    ),
    fault(
        "random numbers not preserved",
        "preserve_rng_state=False, with dropout",
        lambda: InvertibleModuleWrapper(AdditiveCoupling(dropping(), dropping()), preserve_rng_state=False),
        "gradients",
        INPUTS,
        "with dropout off it is right",
        "state",
    ),
    fault(
        "a state that is no buffer",
        "a running mean that a recomputation finds moved",
        lambda: AdditiveCoupling(HiddenState(), branch()),
        "inverse",
        FORTH,
        "not deterministic",
        "gradients",
        "state",
    ),
    fault(
        "the engine is given forward for inverse",
        "in a wrapper of one's own",
        lambda: UndoIsForward(Own()),
        "gradients",
        INPUTS,
        "the gradient of the input",
    ),
    fault(
        "gradient doubled by a skip",
        "2 y - y.detach()",
        lambda: OutputDetached(Own()),
        "gradients",
        DIFFERENCES,
        "is 2 times what it should be",
        stores=True,
    ),
]
