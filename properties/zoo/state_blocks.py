"""The blocks and engines of `properties.zoo.states`, which leave something changed behind."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from properties.zoo.engine import Before, Engine
from properties.zoo.specimen import Own, branch, fault, halves, normalised, whole


class NormalisedTwice(Engine):
    """The recomputation updates the running statistics again."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield


class NotMovedAtAll(Engine):
    """Sets buffers back to their values before the forward pass, and leaves them there."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield
        with torch.no_grad():
            for buffer, value in zip(branch.buffers(), before.buffers, strict=True):
                buffer.copy_(value)


class LeftInEval(Engine):
    """Leaves each branch in eval mode after its recomputation."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield
        for part in branch.modules():
            part.training = False
        with super().same_buffers(branch, before):
            pass


class Unfrozen(Engine):
    """Sets ``requires_grad`` on all parameters of a branch after its recomputation, also on frozen ones."""

    def differentiated(self, branch, before, v, d, found):
        result = super().differentiated(branch, before, v, d, found)
        branch.requires_grad_(True)
        return result

    def __init__(self, *pairs):
        super().__init__(*pairs)
        self.pairs[0].F[0].weight.requires_grad_(False)


class Updating(Engine):
    """Applies a step of SGD to the parameters in its own backward pass."""

    def delivered(self, found):
        with torch.no_grad():
            for parameter, gradient in found.items():
                parameter -= 0.01 * gradient
        return super().delivered(found)


class GeneratorMoved(Engine):
    """Replays the random numbers of dropout, and does not restore the generator afterwards."""

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
    """Multiplies the input by a mask in place; the mask happens to be all ones."""

    def through(self, pair, x):
        x.mul_(1)
        return super().through(pair, x)


class InPlaceSum(Engine):
    """Computes in place in the input: x1 += F(x2), x2 += G(x1)."""

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
    """Works in place without gradients, as if nobody needed the input then."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        x1, x2 = halves(x)
        x1 += self.F(x2)
        x2 += self.G(x1)
        return whole(x1, x2)


class OnTheModule(Engine):
    """Keeps the chain's output on the module, where the next forward pass replaces it."""

    def kept(self, ctx, y):
        self.y = y

    def rebuilt_from(self, ctx):
        return self.y


class StatesOnTheModule(Engine):
    """Keeps generator states on the module instead of with the forward pass."""

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
    """A branch that counts its samples in a buffer at every evaluation; the engine counts them twice."""

    def __init__(self):
        super().__init__()
        self.branch = branch()
        self.register_buffer("samples", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        return self.branch(x)


state_fault = partial(fault, law="state")
