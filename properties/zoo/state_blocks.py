"""The blocks and engines of `properties.zoo.states`, which leave something changed behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from properties.zoo.engine import Before, Engine
from properties.zoo.specimen import Own, branch, fault, halves, normalised, whole


class NormalisedTwice(Engine):
    """The recomputation moves the statistics again."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield


class NotMovedAtAll(Engine):
    """Buffers are put to what they were before the forward pass, and left there."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield
        with torch.no_grad():
            for buffer, value in zip(branch.buffers(), before.buffers, strict=True):
                buffer.copy_(value)


class LeftInEval(Engine):
    """The recomputation is in eval mode for the sake of the statistics, and nothing calls train() again."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield
        for part in branch.modules():
            part.training = False
        with super().same_buffers(branch, before):
            pass


class Unfrozen(Engine):
    """Parameters are frozen while the input's gradient is taken, and all are thawed."""

    def differentiated(self, branch, before, v, d, found):
        result = super().differentiated(branch, before, v, d, found)
        branch.requires_grad_(True)
        return result

    def __init__(self, *pairs):
        super().__init__(*pairs)
        self.pairs[0].F[0].weight.requires_grad_(False)


class Updating(Engine):
    """Applies a step of SGD to each block as soon as its gradient is known."""

    def delivered(self, found):
        with torch.no_grad():
            for parameter, gradient in found.items():
                parameter -= 0.01 * gradient
        return super().delivered(found)


class GeneratorMoved(Engine):
    """Dropout is given its random numbers again, and the generator is left where they end, a second time."""

    @contextmanager
    def same_numbers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        if before.generator is not None:
            torch.set_rng_state(before.generator)
        yield


class Reseeding(Own):
    """Sets the seed before each backward pass, for reproducible masks."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda _: torch.manual_seed(0) and None)
        return y


class CalledTwice(Engine):
    @contextmanager
    def silent(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield


class AutocastLost(Engine):
    @contextmanager
    def same_autocast(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield


class InputWrittenTo(Engine):
    """Masks what is not to be seen, by a mask that happens to be all ones."""

    def through(self, pair, x):
        x.mul_(1)
        return super().through(pair, x)


class InPlaceSum(Engine):
    """x1 += F(x2), x2 += G(x1): the output is the input."""

    def through(self, pair, x):
        x1, x2 = halves(x)
        f, before_F = self.evaluated(pair.F, x2)
        x1 += f
        g, before_G = self.evaluated(pair.G, x1)
        x2 += g
        return x + 0, [before_F, before_G]


class OutputOverwritten(Engine):
    """Backward rebuilds the input in the storage of the output: y2 -= G(y1), y1 -= F(x2)."""

    def kept(self, ctx, y):
        ctx.y = y.detach()

    def rebuilt_from(self, ctx):
        return ctx.y

    def back(self, pair, before, y, dy, found):
        (y1, y2), (dy1, dy2) = halves(y), halves(dy)
        g, from_G = self.differentiated(pair.G, before[1], y1.clone(), dy2, found)
        y2 -= g
        f, from_F = self.differentiated(pair.F, before[0], y2.clone(), dy1 + from_G, found)
        y1 -= f
        return y, whole(dy1 + from_G, dy2 + from_F)


class ArgumentOverwritten(Own):
    """The inverse works in place: y2 -= G(y1)."""

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        y2 -= self.G(y1)
        y1 -= self.F(y2)
        return whole(y1, y2)


class EvaluationOverwrites(Own):
    """In place where no gradient is wanted, since nobody needs the input then."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        x1, x2 = halves(x)
        x1 += self.F(x2)
        x2 += self.G(x1)
        return whole(x1, x2)


class OnTheModule(Engine):
    """The chain's output is kept on the module, where the next pass replaces it."""

    def kept(self, ctx, y):
        self.y = y

    def rebuilt_from(self, ctx):
        return self.y


class StatesOnTheModule(Engine):
    """Generator states are kept on the module, not with the pass."""

    def evaluated(self, branch, v):
        h, before = super().evaluated(branch, v)
        branch.generator = before.generator
        return h, before

    def differentiated(self, branch, before, v, d, found):
        return super().differentiated(branch, Before(branch.generator, before.buffers, before.autocast), v, d, found)


class AlwaysMoving(nn.Module):
    """A branch that updates its statistics in eval mode, too."""

    def __init__(self):
        super().__init__()
        self.branch = normalised()

    def forward(self, x: Tensor) -> Tensor:
        self.branch[1].running_mean.lerp_(x.mean((0, 2, 3)).detach(), 0.1)
        return self.branch(x)


class Counter(nn.Module):
    """A branch that counts its samples, in a buffer, at every evaluation; its engine does not know."""

    def __init__(self):
        super().__init__()
        self.branch = branch()
        self.register_buffer("samples", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.branch(x)


state_fault = partial(fault, law="state")
