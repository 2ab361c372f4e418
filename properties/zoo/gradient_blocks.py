"""The blocks and engines with wrong gradients of `properties.zoo.gradients`."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from properties.zoo.engine import Before, Chain, Engine, Pair, chain_of, taken_back
from properties.zoo.specimen import Own, branch, dropping, halves, whole


class InputDoubled(Engine):
    """Doubles the gradient of the block's input, as if it were returned and also accumulated by hand."""

    def back(self, pair, before, y, dy, found):
        x, dx = super().back(pair, before, y, dy, found)
        return x, 2 * dx


class BiasDropped(Engine):
    def delivered(self, found):
        return [None if p.dim() == 1 else found.get(p) for p in self.parameters()]


class SlightlyOff(Engine):
    def delivered(self, found):
        return [g if g is None else 1.001 * g for g in super().delivered(found)]


class OverTheBatch(Engine):
    """Divides by the batch size a second time."""

    def differentiated(self, branch, before, v, d, found):
        own = {}
        h, dv = super().differentiated(branch, before, v, d, own)
        found.update((p, g / len(v)) for p, g in own.items())
        return h, dv


class WithoutG(Engine):
    """dx1 = dy1: the gradient through G is missing."""

    def back(self, pair, before, y, dy, found):
        (y1, y2), (dy1, dy2) = halves(y), halves(dy)
        g, _ = self.differentiated(pair.G, before[1], y1, dy2, found)
        x2 = y2 - g
        f, from_F = self.differentiated(pair.F, before[0], x2, dy1, found)
        return whole(y1 - f, x2), whole(dy1, dy2 + from_F)


class FFromOld(Engine):
    """F is differentiated with dy1, before G's share is added."""

    def back(self, pair, before, y, dy, found):
        (y1, y2), (dy1, dy2) = halves(y), halves(dy)
        g, from_G = self.differentiated(pair.G, before[1], y1, dy2, found)
        x2 = y2 - g
        f, from_F = self.differentiated(pair.F, before[0], x2, dy1, found)
        return whole(y1 - f, x2), whole(dy1 + from_G, dy2 + from_F)


class NotInverted(Engine):
    """F is evaluated at y2, not at x2."""

    def back(self, pair, before, y, dy, found):
        (y1, y2), (dy1, dy2) = halves(y), halves(dy)
        g, from_G = self.differentiated(pair.G, before[1], y1, dy2, found)
        f, from_F = self.differentiated(pair.F, before[0], y2, dy1 + from_G, found)
        return whole(y1 - f, y2 - g), whole(dy1 + from_G, dy2 + from_F)


class OtherMask(Engine):
    """The recomputation draws new random numbers, and restores the generator afterwards."""

    def same_numbers(self, branch, before):
        return super().same_numbers(branch, Before(None, before.buffers, before.autocast))


class OneMaskForBoth(Engine):
    """Stores one generator state for the block, so that G, which is recomputed first, gets F's mask."""

    def back(self, pair, before, y, dy, found):
        return super().back(pair, [before[0], before[0]], y, dy, found)


class RunningStatistics(Engine):
    """Recomputes in eval mode, so that running statistics are not updated twice."""

    @contextmanager
    def again(self, branch: nn.Module, before: Before) -> Iterator[None]:
        branch.eval()
        with super().again(branch, before):
            yield
        branch.train()


class HalfPrecision(Engine):
    """Rounds the stored output to bfloat16, to save memory."""

    def kept(self, ctx, y):
        ctx.save_for_backward(y.bfloat16())

    def rebuilt_from(self, ctx):
        return ctx.saved_tensors[0].to(next(self.parameters()).dtype)


class SharedOnce(Engine):
    """Replaces, instead of adds, the gradients of a parameter that F and G share."""

    def differentiated(self, branch, before, v, d, found):
        own = {}
        result = super().differentiated(branch, before, v, d, own)
        found.update(own)
        return result


class InputsAlone(Engine):
    """Runs without gradients if the input requires none, although parameters do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(x.requires_grad and torch.is_grad_enabled()):
            return super().forward(x)


class InOrderOfTheTrained(Engine):
    """Returns the gradients of the trained parameters in the places of the first parameters."""

    def delivered(self, found: dict) -> list[Tensor | None]:
        trained = [found.get(p) for p in self.parameters() if p.requires_grad]
        return trained + [None] * (len(list(self.parameters())) - len(trained))


class DifferentiatedTwice(Chain):
    """Does not refuse second derivatives, although ``Engine.differentiated`` detaches the values that they need."""

    @staticmethod
    def backward(ctx, dy):
        return taken_back(ctx, dy)


class HalfTheGraph(Engine):
    """Its gradients have a graph through the sums dy1 + dG and dy2 + dF, but not through the branches."""

    function = DifferentiatedTwice


class NoGraph(HalfTheGraph):
    """Its gradients have no graph, and no error is raised."""

    def back(self, pair, before, y, dy, found):
        return super().back(pair, before, y, dy.detach(), found)


class Overwriting(Engine):
    """Sets ``.grad`` instead of adding to it."""

    def delivered(self, found):
        for parameter, gradient in found.items():
            parameter.grad = gradient
        return [None for _ in self.parameters()]


class KeepEvery(Engine):
    """Keeps the input of every second block, and recomputes from that of its neighbour."""

    def through(self, pair, x):
        result = super().through(pair, x)
        result[1].append(x)
        return result

    def back(self, pair, before, y, dy, found):
        i = [p is pair for p in self.pairs].index(True)
        wrong = before[2] if i % 2 else y
        return super().back(pair, before[:2], wrong, dy, found)


class Detached(Own):
    """F gets ``x2.detach()``."""

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.F(x2.detach())
        return whole(y1, x2 + self.G(y1))


class GDetached(Own):
    """Evaluates G under ``no_grad`` by mistake."""

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = halves(x)
        y1 = x1 + self.F(x2)
        with torch.no_grad():
            g = self.G(y1)
        return whole(y1, x2 + g)


class Checkpointed(nn.Module):
    """A branch with dropout under a checkpoint that does not restore random numbers."""

    def __init__(self):
        super().__init__()
        self.branch = dropping()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.branch(x)
        return checkpoint(self.branch, x, use_reentrant=False, preserve_rng_state=False)


class InPlaceAfter(Own):
    """An engine keeps its output without a copy, and the block around it scales that output in place."""

    class Engine(Engine):
        def kept(self, ctx, y):
            ctx.y = y.detach()

        def rebuilt_from(self, ctx):
            return ctx.y

    def __init__(self):
        super().__init__()
        self.engine = self.Engine()
        self.F = self.G = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.engine(x).mul_(1.5)

    def inverse(self, y: Tensor) -> Tensor:
        return self.engine.inverse(y / 1.5)


class ScaleFunction(Function):
    """s x + t, which saves its output for backward, and forgets the factor s in the gradient of x."""

    @staticmethod
    def forward(ctx, x, s, t):
        ctx.save_for_backward(x * s + t, s, t)
        return x * s + t

    @staticmethod
    def backward(ctx, dy):
        y, s, t = ctx.saved_tensors
        return dy, (dy * (y - t) / s).sum((0, 2, 3), keepdim=True), dy.sum((0, 2, 3), keepdim=True)


class ScaleFunctionOfY(ScaleFunction):
    """Computes the gradient of s with y in place of x."""

    @staticmethod
    def backward(ctx, dy):
        y, s, _t = ctx.saved_tensors
        return dy * s, (dy * y).sum((0, 2, 3), keepdim=True), dy.sum((0, 2, 3), keepdim=True)


class _Matrix(Function):
    """W x, whose gradient of x is multiplied by W instead of its transpose."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x, W):
        ctx.save_for_backward(x, W)
        return torch.einsum("ij,njhw->nihw", W, x)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        return torch.einsum("ij,njhw->nihw", W, dy), torch.einsum("nihw,njhw->ij", dy, x)


class ChannelAffine(nn.Module):
    def __init__(self, function: type[Function]):
        super().__init__()
        self.function = function
        self.s, self.t = (nn.Parameter(torch.rand(1, 4, 1, 1) + 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.s, self.t)

    def inverse(self, y: Tensor) -> Tensor:
        return (y - self.t) / self.s


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.eye(4) + 0.3 * torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return _Matrix.apply(x, self.W)

    def inverse(self, y: Tensor) -> Tensor:
        return torch.einsum("ij,njhw->nihw", torch.linalg.inv(self.W), y)


class Clipped(Own):
    """Clips the gradient inside the block."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            y.register_hook(lambda g: g.clamp(-0.5, 0.5))
        return y


class WrongInverse(Own):
    """The inverse has the wrong sign of F, and the engine rebuilds activations with this inverse."""

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 - self.G(y1)
        return whole(y1 + self.F(x2), x2)


class SlightlyLossy(Own):
    """The inverse rounds the output of G to bfloat16."""

    def inverse(self, y: Tensor) -> Tensor:
        y1, y2 = halves(y)
        x2 = y2 - self.G(y1).bfloat16().to(y2.dtype)
        return whole(y1 - self.F(x2), x2)


def shared(kind: type[Engine]) -> Engine:
    pair = Pair()
    pair.G = pair.F
    return kind(pair)


def of(kind: type[Engine], make: Callable[[], nn.Module] = branch, depth: int = 1) -> dict:
    return {"make": functools.partial(chain_of(kind, make), depth), "chain": chain_of(kind, make)}
