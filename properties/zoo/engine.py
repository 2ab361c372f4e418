"""A classical reversible engine: one autograd.Function runs a chain and stores only the chain's output.

The algorithm is that of Gomez et al., arXiv:1707.04585, algorithm 1. The engine is correct. Each thing that a
recomputation must restore has a method of its own, so that a planted fault overrides one method.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from properties.zoo.specimen import branch, halves, whole


class Pair(nn.Module):
    """F and G of one block."""

    def __init__(self, make: Callable[[], nn.Module] = branch):
        super().__init__()
        self.F, self.G = make(), make()


@dataclass
class Before:
    """The state in which a branch was evaluated; ``generator`` is None if the branch drew no random numbers."""

    generator: Tensor | None
    buffers: list[Tensor]
    autocast: tuple[torch.dtype, bool]


class Chain(Function):
    """Runs the engine's chain and its backward pass. A second derivative raises an error."""

    @staticmethod
    def forward(ctx, x: Tensor, engine: "Engine", *parameters: Tensor) -> Tensor:
        ctx.engine, ctx.before = engine, []
        for pair in engine.pairs:
            x, before = engine.through(pair, x)
            ctx.before.append(before)
        engine.kept(ctx, x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return taken_back(ctx, dy)


def taken_back(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of ``Chain.forward``, computed from the gradient of its output."""
    engine, found = ctx.engine, {}
    y = engine.rebuilt_from(ctx)
    for pair, before in zip(reversed(engine.pairs), reversed(ctx.before), strict=True):
        y, dy = engine.back(pair, before, y, dy, found)
    return dy, None, *engine.delivered(found)


class Engine(nn.Module):
    """A chain of additive couplings. A recomputation restores buffers, random numbers and autocast. It runs no hook."""

    function: type[Function] = Chain

    def __init__(self, *pairs: Pair):
        super().__init__()
        self.pairs = nn.ModuleList(pairs or [Pair()])

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self, *self.parameters())

    def inverse(self, y: Tensor) -> Tensor:
        for pair in reversed(self.pairs):
            y1, y2 = halves(y)
            x2 = y2 - pair.G(y1)
            x1 = y1 - pair.F(x2)
            y = whole(x1, x2)
        return y

    def through(self, pair: Pair, x: Tensor) -> tuple[Tensor, list[Before]]:
        x1, x2 = halves(x)
        f, before_F = self.evaluated(pair.F, x2)
        y1 = x1 + f
        g, before_G = self.evaluated(pair.G, y1)
        y2 = x2 + g
        return whole(y1, y2), [before_F, before_G]

    def evaluated(self, branch: nn.Module, v: Tensor) -> tuple[Tensor, Before]:
        generator = torch.get_rng_state()
        before = Before(
            generator,
            [b.clone() for b in branch.buffers()],
            (torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")),
        )
        h = branch(v)
        if torch.equal(generator, torch.get_rng_state()):
            before.generator = None
        return h, before

    def back(self, pair: Pair, before: list[Before], y: Tensor, dy: Tensor, found: dict) -> tuple[Tensor, Tensor]:
        """Return the block's input and its gradient, computed from the block's output and its gradient."""
        (y1, y2), (dy1, dy2) = halves(y), halves(dy)
        g, from_G = self.differentiated(pair.G, before[1], y1, dy2, found)
        x2, dx1 = y2 - g, dy1 + from_G
        f, from_F = self.differentiated(pair.F, before[0], x2, dx1, found)
        x1, dx2 = y1 - f, dy2 + from_F
        return whole(x1, x2), whole(dx1, dx2)

    def differentiated(
        self, branch: nn.Module, before: Before, v: Tensor, d: Tensor, found: dict
    ) -> tuple[Tensor, Tensor]:
        """Return h = branch(v) and the gradient of v for the gradient d of h; add those of parameters to ``found``."""
        parameters = [p for p in branch.parameters() if p.requires_grad]
        with self.again(branch, before), torch.enable_grad():
            v = v.detach().requires_grad_()
            h = branch(v)
            dv, *gradients = torch.autograd.grad(h, (v, *parameters), d.to(h.dtype))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            found[parameter] = found[parameter] + gradient if parameter in found else gradient
        return h.detach(), dv

    @contextmanager
    def again(self, branch: nn.Module, before: Before) -> Iterator[None]:
        """Let the branch compute the same as before within this context, and restore all state at its end."""
        with ExitStack() as stack:
            for step in (self.same_numbers, self.same_autocast, self.same_buffers, self.silent):
                stack.enter_context(step(branch, before))
            yield

    @contextmanager
    def same_numbers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        now = torch.get_rng_state()
        if before.generator is not None:
            torch.set_rng_state(before.generator)
        yield
        torch.set_rng_state(now)

    @contextmanager
    def same_autocast(self, branch: nn.Module, before: Before) -> Iterator[None]:
        dtype, enabled = before.autocast
        with torch.autocast("cpu", dtype, enabled=enabled):
            yield

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        now = [b.clone() for b in branch.buffers()]
        _put(branch, before.buffers)
        yield
        _put(branch, now)

    @contextmanager
    def silent(self, branch: nn.Module, before: Before) -> Iterator[None]:
        hooks = [(part, part._forward_hooks) for part in branch.modules()]
        for part, of in hooks:
            part._forward_hooks = type(of)()
        yield
        for part, of in hooks:
            part._forward_hooks = of

    def kept(self, ctx, y: Tensor) -> None:
        ctx.save_for_backward(y)

    def rebuilt_from(self, ctx) -> Tensor:
        return ctx.saved_tensors[0]

    def delivered(self, found: dict) -> list[Tensor | None]:
        """Return the gradients of all parameters, as autograd expects them from ``Chain.backward``."""
        return [found.get(p) for p in self.parameters()]


def _put(branch: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for buffer, value in zip(branch.buffers(), values, strict=True):
            buffer.copy_(value)


def chain_of(engine: type[Engine], make: Callable[[], nn.Module] = branch) -> Callable[[int], Engine]:
    """Return a function that makes an engine with a given number of blocks."""
    return lambda depth: engine(*(Pair(make) for _ in range(depth)))
