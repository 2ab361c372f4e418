"""Faults of MemCNN 1.5 and its predecessors, each in an engine that is otherwise correct."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from properties.zoo.engine import Before, Engine
from properties.zoo.gradient_blocks import InputDoubled, of
from properties.zoo.gradients import DIFFERENCES
from properties.zoo.specimen import Own, dropping, fault, halves, normalised
from properties.zoo.states import AUTOCAST, BUFFERS, CALLER, HOOKS


class EvaluatedThrice(Engine):
    """Evaluates F and G under ``no_grad``, again to invert, and again to differentiate."""

    @contextmanager
    def same_buffers(self, branch: nn.Module, before: Before) -> Iterator[None]:
        yield

    def back(self, pair, before, y, dy, found):
        for module, v in ((pair.G, halves(y)[0]), (pair.F, halves(y)[1])):
            with self.again(module, Before(None, before[0].buffers, before[0].autocast)):
                module(v)
        return super().back(pair, before, y, dy, found)


class InputEmptied(Engine):
    """Frees the input's storage once the output is computed, and refills it in backward."""

    def through(self, pair, x):
        y, before = super().through(pair, x)
        self.emptied = x
        x.untyped_storage().resize_(0)
        return y, before

    def back(self, pair, before, y, dy, found):
        x, dx = super().back(pair, before, y, dy, found)
        size = x.numel() * x.element_size()
        if self.emptied.untyped_storage().nbytes() == 0:
            self.emptied.untyped_storage().resize_(size)
            self.emptied.copy_(x)
        return x, dx


class EmptiedInEvaluation(Own):
    """Frees the input's storage without gradients as well, where nothing refills it."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not torch.is_grad_enabled():
            x.untyped_storage().resize_(0)
        return y


class NewMasks(Engine):
    """Does not replay random numbers, as with the former default ``preserve_rng_state=False``."""

    def same_numbers(self, branch, before):
        return super().same_numbers(branch, Before(None, before.buffers, before.autocast))


class HooksNotCalled(Engine):
    """Calls ``F.forward`` instead of F in the forward pass."""

    def evaluated(self, branch, v):
        with self.silent(branch, None):
            return super().evaluated(branch, v)


class CastAway(Engine):
    """The recomputation runs with autocast off."""

    @contextmanager
    def same_autocast(self, branch: nn.Module, before: Before) -> Iterator[None]:
        with torch.autocast("cpu", enabled=False):
            yield


class OutputShared(Engine):
    """Uses the storage of the chain's output again for the rebuilt input."""

    def kept(self, ctx, y):
        ctx.y = y.detach()

    def rebuilt_from(self, ctx):
        return ctx.y

    def back(self, pair, before, y, dy, found):
        x, dx = super().back(pair, before, y, dy, found)
        y.untyped_storage().resize_(0)
        return x, dx


upstream = partial(fault, wrap=False)

FAULTS = [
    upstream(
        "upstream: input gradient doubled",
        "delivered, and added by hand",
        law="gradients",
        claim=DIFFERENCES,
        says="the gradient of the input is 2 times what it should be",
        **of(InputDoubled),
    ),
    upstream(
        "upstream: dropout's gradients wrong",
        "masks are not replayed",
        law="gradients",
        claim=DIFFERENCES,
        says="with dropout off it is right",
        **of(NewMasks, dropping),
    ),
    upstream(
        "upstream: batch normalisation moves three times",
        "F and G are evaluated three times",
        law="state",
        claim=BUFFERS,
        says="from 0 to 3, a forward pass to 1",
        **of(EvaluatedThrice, normalised),
    ),
    upstream(
        "upstream: input emptied by training",
        "its storage is given back",
        law="state",
        claim=CALLER,
        says="storage of the input was changed",
        **of(InputEmptied),
    ),
    upstream(
        "upstream: evaluation empties the batch",
        "nothing refills it",
        law="state",
        claim=CALLER,
        says="576 bytes to 0 without gradients",
        make=EmptiedInEvaluation,
        stores=True,
    ),
    upstream(
        "upstream: output emptied by backward",
        "after its input is rebuilt",
        law="state",
        claim=CALLER,
        says="storage of output 0 was changed",
        **of(OutputShared),
    ),
    upstream(
        "upstream: hooks not called",
        "within autograd.Function",
        law="state",
        claim=HOOKS,
        says="called 0 times",
        **of(HooksNotCalled),
    ),
    upstream(
        "upstream: autocast lost",
        "the recomputation runs in float32",
        law="state",
        claim=AUTOCAST,
        says="products in float32",
        **of(CastAway),
    ),
]
