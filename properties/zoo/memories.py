"""Faults of memory: activations that outlive their use, block by block."""

from functools import partial

from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from properties.zoo.engine import Engine
from properties.zoo.gradient_blocks import of
from properties.zoo.inverse_blocks import Additive
from properties.zoo.specimen import LARGE, Own, branch, fault

CLAIM, SAYS = "peak bytes", "each further block holds"


class OnTheModule(Own):
    """Keeps its last output as an attribute, for a plot."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.last = y.detach()
        return y


class WithItsGraph(Own):
    """Keeps a regularisation term together with its graph."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.penalty = self.F(x.chunk(2, 1)[1]).square()
        return y


class InAHook(nn.Module):
    """A branch whose forward hook keeps the input."""

    def __init__(self):
        super().__init__()
        self.branch = branch()
        self.branch.register_forward_hook(self.look)

    def look(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.seen = inputs[0].detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x)


class InAClosure(Engine):
    """Keeps a closure over the input of every block until backward."""

    def through(self, pair, x):
        y, before = super().through(pair, x)
        return y, [*before, lambda: x]

    def back(self, pair, before, y, dy, found):
        return super().back(pair, before[:2], y, dy, found)


class EveryInput(Engine):
    """Keeps each block's input for its recomputation, as checkpointing does."""

    def through(self, pair, x):
        y, before = super().through(pair, x)
        return y, [*before, x]

    def back(self, pair, before, y, dy, found):
        _, dx = super().back(pair, before[:2], y, dy, found)
        return before[2], dx


class NeverFreed(Engine):
    """Keeps every rebuilt input until the end of the backward pass."""

    def rebuilt_from(self, ctx):
        self.collected = []
        return super().rebuilt_from(ctx)

    def back(self, pair, before, y, dy, found):
        x, dx = super().back(pair, before, y, dy, found)
        self.collected.append(x)
        return x, dx


class ValuesKept(Engine):
    """Keeps the outputs of F and G, so that the inverse need not evaluate them."""

    def evaluated(self, branch, v):
        h, before = super().evaluated(branch, v)
        before.value = h
        return h, before


class MaskKept(Engine):
    """Keeps for backward which entries were positive: a byte for each."""

    def through(self, pair, x):
        y, before = super().through(pair, x)
        return y, [*before, x > 0]

    def back(self, pair, before, y, dy, found):
        return super().back(pair, before[:2], y, dy, found)


class PlainCouple(Additive):
    """Computes with plain operations instead of ``memcnn.engine.couple.couple``, so the engine records no step."""

    def couple(self, x1: Tensor, x2: Tensor) -> tuple[Tensor, Tensor]:
        y1 = x1 + self.Fm(x2)
        return y1, x2 + self.Gm(y1)


class History(Own):
    """Appends a copy of every output to a list."""

    def __init__(self):
        super().__init__()
        self.history = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.history.append(y.detach().clone())
        return y


def stored_every_time(depth: int) -> ReversibleSequential:
    """Return a chain whose ``keep_every`` is 1 by mistake, so that it stores every block."""
    return ReversibleSequential(*(AdditiveCoupling(branch(), branch()) for _ in range(depth)), keep_every=1)


memory_fault = partial(fault, law="memory", claim=CLAIM, says=SAYS, shape=LARGE)

FAULTS = [
    memory_fault("last output kept on the module", "for a plot", OnTheModule),
    memory_fault("a term kept with its graph", "a regulariser, until the next pass", WithItsGraph),
    memory_fault("a hook keeps what it is shown", "the branch's input", lambda: AdditiveCoupling(InAHook(), branch())),
    memory_fault("history of outputs", "a list that nobody empties", History),
    memory_fault("a closure over each block", "lambda: x", wrap=False, **of(InAClosure)),
    memory_fault("each block's input kept", "a checkpoint, not an inverse", wrap=False, **of(EveryInput)),
    memory_fault("rebuilt values kept", "until the end of backward", wrap=False, **of(NeverFreed)),
    memory_fault("values of F and G kept", "to spare the inverse", wrap=False, **of(ValuesKept)),
    fault(
        "a mask kept",
        "a byte an entry: less than a generator's state",
        law="memory",
        claim="what a further block holds",
        says="more of a batch twice as large",
        wrap=False,
        **of(MaskKept),
    ),
    memory_fault("coupling written in plain operations", "the wrapper has nothing to forget", PlainCouple),
    memory_fault(
        "wrapper disabled",
        "left from debugging",
        lambda: InvertibleModuleWrapper(AdditiveCoupling(branch(), branch()), disable=True),
    ),
    memory_fault(
        "wrapper that keeps its input",
        "keep_input=True",
        lambda: InvertibleModuleWrapper(AdditiveCoupling(branch(), branch()), keep_input=True),
    ),
    memory_fault(
        "every block stored", "keep_every=1", lambda: AdditiveCoupling(branch(), branch()), chain=stored_every_time
    ),
]
