"""A chain of reversible modules that stores only its last output for backward."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from memcnn.engine.chain import storing
from memcnn.engine.couple import keep_only, merge, recording, split
from memcnn.engine.direct import LONGEST_RUN, run_directly
from memcnn.engine.exact import Grid
from memcnn.engine.sums import AdditiveStep
from memcnn.engine.torch_private import is_hooked
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.budget import Budget
from memcnn.models.coupling import Coupling
from memcnn.models.keywords import keywords_taken, refuse_unknown, taken
from memcnn.models.log_det import constant_log_det
from memcnn.models.wrapper import InvertibleModuleWrapper, is_recorded, uncompiled


class ReversibleSequential(nn.Sequential):
    """A chain of reversible modules that stores only its last output for backward.

    Args:
        *modules: couplings, wrapped blocks, or any modules with ``forward`` and ``inverse`` that map one tensor to one.
        keep_every: let every ``keep_every``-th block, counted from the end, store its activations, so that backward
            need not recompute it: 1 is ordinary autograd, 2 recomputes half of the blocks, None all of them.
        budget_bytes: the most that activations may take, in place of ``keep_every``: as many blocks as fit store
            theirs, those first that save the most time for each byte. ``memcnn.models.budget`` defines what counts.
        exact: set ``exact`` of every coupling; all must be additive. None leaves them as they are.

    Raises:
        ValueError: ``keep_every`` or ``budget_bytes`` is no positive whole number, both are given, or ``exact`` is
            given and a module is no additive coupling.
    """

    def __init__(
        self,
        *modules: nn.Module,
        keep_every: int | None = None,
        exact: bool | float | Grid | None = None,
        budget_bytes: int | None = None,
    ):
        super().__init__(*(m if isinstance(m, _REVERSIBLE) else InvertibleModuleWrapper(m) for m in modules))
        if keep_every is not None and (type(keep_every) is not int or keep_every < 1):
            raise ValueError(f"keep_every must be None or a whole number of at least 1: got {keep_every!r}")
        if keep_every is not None and budget_bytes is not None:
            raise ValueError(
                f"got keep_every={keep_every} and budget_bytes={budget_bytes}, which both choose the blocks that "
                "store their activations; leave one out"
            )
        self.keep_every = keep_every
        self.budget = None if budget_bytes is None else Budget(budget_bytes)
        if exact is not None:
            for i, module in enumerate(self):
                if not isinstance(module, InvertibleModuleWrapper) or not isinstance(module._fn, AdditiveCoupling):
                    raise ValueError(
                        "only additive couplings can be exact: module "
                        f"{i} is a {type(getattr(module, '_fn', module)).__name__};"
                        " leave exact out, or replace the module"
                    )
                module._fn.grid = Grid.of(exact)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # Sequential calls it input
        """Return y, of the shape that the modules give it.

        Each keyword argument is handed to the modules, and within couplings to the branches, whose ``forward`` takes
        it.
        """
        refuse_unknown(self, kwargs)
        for store, blocks in self._runs(list(self), self._stored("forward", x, kwargs)):
            with storing() if store else nullcontext():
                values = [x]
                del x
                x = (
                    _run_of(blocks, values, kwargs)
                    if len(blocks) > 1
                    else blocks[0](values.pop(), **taken(blocks[0], kwargs))
                )
        return x

    def inverse(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return x with ``self(x, **kwargs) = y``, differentiable with the same savings."""
        refuse_unknown(self, kwargs)
        for store, blocks in self._runs(list(reversed(self)), self._stored("inverse", y, kwargs)):
            with storing() if store else nullcontext():
                values = [y]
                del y
                y = (
                    _run_of(blocks, values, kwargs, inverse=True)
                    if len(blocks) > 1
                    else blocks[0].inverse(values.pop(), **taken(blocks[0], kwargs))
                )
        return y

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that one of the modules takes as keyword arguments."""
        return {name for module in self for name in keywords_taken(module, names)}

    def _runs(self, blocks: list[nn.Module], stored: Collection[int]) -> Iterator[tuple[bool, list[Any]]]:
        """Yield the blocks to run together, each time with whether they store their activations."""
        stores = [i in stored for i in range(len(blocks))]
        alike = [None if store else _halves_passed_on(block) for store, block in zip(stores, blocks, strict=True)]
        start = 0
        for run in _runs(blocks, alike):
            yield stores[start], run
            start += len(run)

    def _stored(self, direction: str, x: Tensor, kwargs: dict[str, object]) -> Collection[int]:
        """Return the positions of the blocks that store their activations, in the order in which they run."""
        if self.budget is not None:
            return self.budget.stored(self, direction, x, kwargs)
        return () if self.keep_every is None else range(len(self) - 1, -1, -self.keep_every)

    def forward_log_det(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return y, and log|det dy/dx| of each sample, shape (N,): the sum of the modules' own."""
        refuse_unknown(self, kwargs)
        total = constant_log_det(x)
        stored = self._stored("forward_log_det", x, kwargs)
        module: Any
        for i, module in enumerate(self):
            with storing() if i in stored else nullcontext():
                x, log_det = module.forward_log_det(x, **taken(module, kwargs))
            total = total + log_det
        return x, total

    def inverse_log_det(self, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return x, and log|det dx/dy| of each sample, shape (N,)."""
        refuse_unknown(self, kwargs)
        total = constant_log_det(y)
        stored = self._stored("inverse_log_det", y, kwargs)
        module: Any
        for i, module in enumerate(reversed(self)):
            with storing() if i in stored else nullcontext():
                y, log_det = module.inverse_log_det(y, **taken(module, kwargs))
            total = total + log_det
        return y, total


_REVERSIBLE = (InvertibleModuleWrapper, ReversibleSequential)


class HalvesPassedOn(nn.Sequential):
    """An ``nn.Sequential`` whose neighbouring wrapped couplings pass on two halves instead of joining them each time.

    What it computes, its state-dict keys and the other modules in it are those of ``nn.Sequential``.
    """

    def forward(self, x: Tensor) -> Tensor:
        units = list(self)
        for blocks in _runs(units, [_halves_passed_on(unit) for unit in units]):
            values = [x]
            del x
            x = _run_of(blocks, values, {}) if len(blocks) > 1 else blocks[0](values.pop())
        return x


def _runs(blocks: Sequence[nn.Module], alike: Sequence[tuple | None]) -> list[list[Any]]:
    """Return the blocks in order, those together that follow each other and are alike; None is like no other."""
    runs: list[list[Any]] = []
    previous = None
    for block, kind in zip(blocks, alike, strict=True):
        if kind is not None and kind == previous:
            runs[-1].append(block)
        else:
            runs.append([block])
        previous = kind
    return runs


def _halves_passed_on(block: nn.Module) -> tuple | None:
    """Return equal values for blocks that can pass on two halves instead of their tensor; None for any other block."""
    if not isinstance(block, InvertibleModuleWrapper) or block.disable or block.keep_input or block.keep_input_inverse:
        return None
    coupling = block._modules["_fn"]  # faster than block._fn
    if not isinstance(coupling, Coupling) or is_hooked(block) or is_hooked(coupling):
        return None
    if (type(coupling).forward, type(coupling).inverse) != (Coupling.forward, Coupling.inverse):
        return None
    return coupling.split_dim, coupling.grid, block.preserve_rng_state, block.check_inverse


def _run_of(
    blocks: Sequence[InvertibleModuleWrapper],
    values: list[Tensor],
    kwargs: dict[str, object],
    *,
    inverse: bool = False,
) -> Tensor:
    """Run the wrapped couplings, or their inverses, one after the other.

    ``values`` holds the input alone. It is taken out, so that no caller keeps the input until the last block has run.
    """
    if not any(is_recorded(block._fn, values) for block in blocks):
        return _run_on_halves(blocks, values, kwargs, inverse)
    options = {"preserve_rng_state": blocks[0].preserve_rng_state, "check_inverse": blocks[0].check_inverse}
    return _recorded_run(blocks, values, kwargs, inverse, options)


@uncompiled
def _recorded_run(
    blocks: Sequence[InvertibleModuleWrapper],
    values: list[Tensor],
    kwargs: dict[str, object],
    inverse: bool,
    options: dict,
) -> Tensor:
    """Run the couplings in one recording of the engine with these options."""
    with recording(**options):
        return _run_on_halves(blocks, values, kwargs, inverse)


def _run_on_halves(
    blocks: Sequence[InvertibleModuleWrapper], values: list[Tensor], kwargs: dict[str, object], inverse: bool
) -> Tensor:
    """Split the input, run the couplings or their inverses on its halves, and join the halves."""
    coupling: Any = blocks[0]._fn
    halves = [*split(values.pop(), coupling.split_dim, coupling.grid)]
    start = 0
    while start < len(blocks):
        # run_directly needs an input that requires a gradient; if x does not, only the blocks after the first have one
        part = blocks[start : start + (LONGEST_RUN if halves[0].requires_grad else 1)]
        start += len(part)
        if kwargs or not run_directly(_sums(part, inverse), halves, subtract=inverse):
            for block in part:
                change = block._fn.uncouple if inverse else block._fn.couple
                halves[:] = change(*halves, **(taken(block, kwargs) if kwargs else kwargs))
                keep_only(*halves)
        keep_only(*halves)
    y1, y2 = halves
    return merge(y1, y2, coupling.split_dim, coupling.grid)


def _sums(blocks: Sequence[InvertibleModuleWrapper], subtract: bool) -> Sequence[AdditiveStep]:
    """Return the steps of the wrapped couplings in order, or an empty list if one of them is no sum."""
    steps: list[AdditiveStep] = []
    for block in blocks:
        coupling = block._modules["_fn"]  # faster than block._fn
        own = coupling.sums(subtract=subtract) if isinstance(coupling, AdditiveCoupling) else ()
        if not own:
            return []
        steps += own
    return steps
