"""Reversible blocks: modules that rebuild their activations in backward instead of storing them.

``memcnn.engine`` is how it works.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states  # noqa: F401 - names of MemCNN 1.5

from memcnn import migration
from memcnn.engine.chain import is_storing, storing
from memcnn.engine.couple import keep_only, merge, recording, split
from memcnn.engine.exact import Grid
from memcnn.engine.opaque import call_opaque
from memcnn.engine.replay import Replay
from memcnn.engine.torch_private import is_hooked, is_transformed
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.affine import AffineCoupling
from memcnn.models.coupling import Coupling
from memcnn.models.keywords import keywords_taken, refuse_unknown, taken
from memcnn.models.log_det import constant_log_det

__all__ = [
    "InvertibleModuleWrapper",
    "ReversibleBlock",
    "ReversibleSequential",
    "create_coupling",
    "is_invertible_module",
]


_uncompiled = torch.compiler.disable(
    reason="a reversible block runs uncompiled, but its branches may be: coupling.Fm.compile()"
)


class InvertibleModuleWrapper(nn.Module):
    """Runs an invertible module without storing its activations for backward.

    Gradients, side effects and hooks are those of ``fn`` alone. For a coupling the backward pass evaluates F and G once
    each; for any other module it evaluates ``fn.inverse`` and ``fn.forward``. Chained blocks store only the last one's
    output. Inputs and outputs stay valid for whoever holds them.

    Args:
        fn: a module with ``forward`` and ``inverse``, where ``fn.inverse(fn(x))`` gives x up to rounding.
        keep_input: store the block's input, so that backward re-runs ``forward`` on it and needs no inverse.
        keep_input_inverse: the same for training through ``inverse``.
        num_bwd_passes: accepted for compatibility; a retained graph may be differentiated any number of times.
        disable: run ``fn`` under ordinary autograd, which stores every activation. May be switched at any time.
        preserve_rng_state: replay the random numbers of the forward pass (dropout) in the recomputation.
        check_inverse: the largest relative error of rebuilt inputs, such as 1e-4. Inputs are then stored and compared
            with the rebuilt ones. A larger error, of this block or accumulated in later ones, is a RuntimeError.
    """

    def __init__(
        self,
        fn: nn.Module,
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        num_bwd_passes: int = 1,
        disable: bool = False,
        preserve_rng_state: bool = True,
        *,
        check_inverse: float | None = None,
    ):
        super().__init__()
        if not isinstance(fn, nn.Module) or not callable(getattr(fn, "inverse", None)):
            raise TypeError(
                f"fn must be an nn.Module with forward and inverse: got {type(fn).__name__}; give it an "
                "inverse method, or build a coupling from it, such as AdditiveCoupling(fn)"
            )
        self.disable = disable
        self.keep_input = keep_input
        self.keep_input_inverse = keep_input_inverse
        self.num_bwd_passes = num_bwd_passes
        self.preserve_rng_state = preserve_rng_state
        self.check_inverse = check_inverse
        self._fn: Any = fn  # a module with an inverse

    def __setstate__(self, state: dict) -> None:
        """Restore a pickle, which MemCNN 1.5 may have written."""
        super().__setstate__(migration.wrapper_state(state, InvertibleModuleWrapper))

    def forward(self, *xin: Any, **kwargs: Any) -> Any:
        """Return ``fn(*xin, **kwargs)``. ``fn.inverse`` must return the floating-point tensors among ``xin``."""
        return self._run(self._fn, self._fn.inverse, xin, kwargs, self.keep_input)

    def inverse(self, *yin: Any, **kwargs: Any) -> Any:
        """Return ``fn.inverse(*yin, **kwargs)``, which can be differentiated with the same savings."""
        return self._run(self._fn.inverse, self._fn, yin, kwargs, self.keep_input_inverse)

    def forward_log_det(self, *xin: Any, **kwargs: Any) -> Any:
        """Return y = ``self(*xin, **kwargs)`` and log|det dy/dx| of each sample, shape (N,).

        ``memcnn.models.log_det`` explains it.
        """
        run = _log_det_method(self._fn, "forward_log_det")
        return self._run(run, self._fn.inverse, xin, kwargs, self.keep_input, log_det=True)

    def inverse_log_det(self, *yin: Any, **kwargs: Any) -> Any:
        """Return x = ``self.inverse(*yin, **kwargs)`` and log|det dx/dy| of each sample, shape (N,)."""
        run = _log_det_method(self._fn, "inverse_log_det")
        return self._run(run, self._fn, yin, kwargs, self.keep_input_inverse, log_det=True)

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that ``fn`` takes as keyword arguments."""
        return keywords_taken(self._fn, names)

    def _run(
        self, run: Callable, undo: Callable, inputs: tuple, kwargs: dict, keep_input: bool, log_det: bool = False
    ) -> Any:
        if self.disable or not _is_recorded(self._fn, inputs):
            return run(*inputs, **kwargs)
        return self._run_recorded(run, undo, inputs, kwargs, keep_input, log_det)

    @_uncompiled
    def _run_recorded(
        self, run: Callable, undo: Callable, inputs: tuple, kwargs: dict, keep_input: bool, log_det: bool
    ) -> Any:
        options: dict[str, Any] = {
            "preserve_rng_state": self.preserve_rng_state,
            "keep_input": keep_input,
            "check_inverse": self.check_inverse,
        }
        if isinstance(self._fn, Coupling):
            with recording(**options):
                return run(*inputs, **kwargs)
        return call_opaque(run, undo, self._fn, inputs, kwargs, log_det=log_det, **options)


class ReversibleBlock(InvertibleModuleWrapper):
    """A wrapped coupling of F and G; see ``create_coupling`` and ``InvertibleModuleWrapper`` for the arguments."""

    def __init__(
        self,
        Fm: nn.Module,
        Gm: nn.Module | None = None,
        coupling: str = "additive",
        keep_input: bool = False,
        keep_input_inverse: bool = False,
        implementation_fwd: int | None = None,
        implementation_bwd: int | None = None,
        adapter: Callable[[nn.Module], nn.Module] | None = None,
        split_dim: int = 1,
        preserve_rng_state: bool = True,
    ):
        super().__init__(
            create_coupling(Fm, Gm, coupling, implementation_fwd, implementation_bwd, adapter, split_dim),
            keep_input=keep_input,
            keep_input_inverse=keep_input_inverse,
            preserve_rng_state=preserve_rng_state,
        )


class ReversibleSequential(nn.Sequential):
    """Reversible modules one after the other, of which only the end's output is stored for backward.

    Args:
        *modules: couplings, wrapped blocks, or any modules with ``forward`` and ``inverse`` that map one tensor to one.
        keep_every: let every ``keep_every``-th block, counted from the end, store its activations, so that backward
            need not recompute it: 1 is ordinary autograd, 2 recomputes half of the blocks, None all of them.
        exact: set ``exact`` of every coupling, which must be additive ones; None leaves them as they are.
    """

    def __init__(self, *modules: nn.Module, keep_every: int | None = None, exact: bool | float | Grid | None = None):
        super().__init__(*(m if isinstance(m, _REVERSIBLE) else InvertibleModuleWrapper(m) for m in modules))
        if keep_every is not None and (not isinstance(keep_every, int) or keep_every < 1):
            raise ValueError(f"keep_every must be None or a whole number of at least 1: got {keep_every!r}")
        self.keep_every = keep_every
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
        for store, blocks in self._runs(list(self)):
            with storing() if store else nullcontext():
                values = [x]
                del x
                x = (
                    _run_of(blocks, values, Coupling.couple, kwargs)
                    if len(blocks) > 1
                    else blocks[0](values.pop(), **taken(blocks[0], kwargs))
                )
        return x

    def inverse(self, y: Tensor, **kwargs: Any) -> Tensor:
        """Return x with ``self(x, **kwargs) = y``, differentiable with the same savings."""
        refuse_unknown(self, kwargs)
        for store, blocks in self._runs(list(reversed(self))):
            with storing() if store else nullcontext():
                values = [y]
                del y
                y = (
                    _run_of(blocks, values, Coupling.uncouple, kwargs)
                    if len(blocks) > 1
                    else blocks[0].inverse(values.pop(), **taken(blocks[0], kwargs))
                )
        return y

    def keywords_taken(self, names: Iterable[str]) -> set[str]:
        """Return those of the names that one of the modules takes as keyword arguments."""
        return {name for module in self for name in keywords_taken(module, names)}

    def _runs(self, blocks: list[nn.Module]) -> Iterator[tuple[bool, list[Any]]]:
        """Yield the blocks to run together, each time with whether they store their activations."""
        stores = [self._stores(len(blocks) - 1 - i) for i in range(len(blocks))]
        alike = [None if store else _halves_passed_on(block) for store, block in zip(stores, blocks, strict=True)]
        start = 0
        for run in _runs(blocks, alike):
            yield stores[start], run
            start += len(run)

    def _stores(self, distance_to_end: int) -> bool:
        return self.keep_every is not None and distance_to_end % self.keep_every == 0

    def forward_log_det(self, x: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return y, and log|det dy/dx| of each sample, shape (N,): the sum of the modules' own."""
        refuse_unknown(self, kwargs)
        total = constant_log_det(x)
        module: Any
        for i, module in enumerate(self):
            with storing() if self._stores(len(self) - 1 - i) else nullcontext():
                x, log_det = module.forward_log_det(x, **taken(module, kwargs))
            total = total + log_det
        return x, total

    def inverse_log_det(self, y: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return x, and log|det dx/dy| of each sample, shape (N,)."""
        refuse_unknown(self, kwargs)
        total = constant_log_det(y)
        module: Any
        for i, module in enumerate(reversed(self)):
            with storing() if self._stores(len(self) - 1 - i) else nullcontext():
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
            x = _run_of(blocks, values, Coupling.couple, {}) if len(blocks) > 1 else blocks[0](values.pop())
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
    coupling = block._fn
    if not isinstance(coupling, Coupling) or is_hooked(block) or is_hooked(coupling):
        return None
    if (type(coupling).forward, type(coupling).inverse) != (Coupling.forward, Coupling.inverse):
        return None
    return coupling.split_dim, coupling.grid, block.preserve_rng_state, block.check_inverse


def _run_of(
    blocks: Sequence[InvertibleModuleWrapper], values: list[Tensor], change: Callable, kwargs: dict[str, object]
) -> Tensor:
    """Run the wrapped couplings one after the other, ``change`` being ``Coupling.couple`` or ``Coupling.uncouple``.

    ``values`` holds the input alone. It is taken out, so that no caller keeps the input until the last block has run.
    """
    if not any(_is_recorded(block._fn, values) for block in blocks):
        return _halves_changed(blocks, values, change, kwargs)
    options = {"preserve_rng_state": blocks[0].preserve_rng_state, "check_inverse": blocks[0].check_inverse}
    return _recorded_run(blocks, values, change, kwargs, options)


@_uncompiled
def _recorded_run(
    blocks: Sequence[InvertibleModuleWrapper],
    values: list[Tensor],
    change: Callable,
    kwargs: dict[str, object],
    options: dict,
) -> Tensor:
    with recording(**options):
        return _halves_changed(blocks, values, change, kwargs)


def _halves_changed(
    blocks: Sequence[InvertibleModuleWrapper], values: list[Tensor], change: Callable, kwargs: dict[str, object]
) -> Tensor:
    coupling: Any = blocks[0]._fn
    halves = split(values.pop(), coupling.split_dim, coupling.grid)
    for block in blocks:
        halves = getattr(block._fn, change.__name__)(*halves, **(taken(block, kwargs) if kwargs else kwargs))
        keep_only(*halves)
    return merge(*halves, coupling.split_dim, coupling.grid)


def create_coupling(
    Fm: nn.Module,
    Gm: nn.Module | None = None,
    coupling: str = "additive",
    implementation_fwd: int | None = None,
    implementation_bwd: int | None = None,
    adapter: Callable[[nn.Module], nn.Module] | None = None,
    split_dim: int = 1,
) -> Coupling:
    """Return an additive or an affine coupling of the modules F and G.

    Args:
        Fm: F, as for the coupling.
        Gm: G, likewise; a deep copy of F if it is not given.
        coupling: "additive" or "affine".
        implementation_fwd: accepted for compatibility; it has no effect.
        implementation_bwd: likewise.
        adapter: as for ``AffineCoupling``; an additive coupling ignores it.
        split_dim: the dimension along which the input is halved.

    Raises:
        NotImplementedError: ``coupling`` is another name.
    """
    if coupling == "affine":
        return AffineCoupling(Fm, Gm, adapter, implementation_fwd, implementation_bwd, split_dim)
    if coupling != "additive":
        raise NotImplementedError(f"unknown coupling {coupling!r}: choose 'additive' or 'affine'")
    return AdditiveCoupling(Fm, Gm, implementation_fwd, implementation_bwd, split_dim)


def is_invertible_module(
    module_in: nn.Module,
    test_input_shape: Sequence,
    test_input_dtype: torch.dtype = torch.float32,
    atol: float = 1e-6,
    random_seed: int = 42,
    *,
    device: torch.device | str = "cpu",
) -> bool:
    """Return whether inverse(forward(x)) = x and forward(inverse(y)) = y, for a random x and y = forward(x).

    Buffers and random generators are the same after the call as before. Warns if a result shares memory with an input,
    or if two results are the same tensor.

    Args:
        module_in: the module, wrapped or not.
        test_input_shape: the shape of x, or a sequence of shapes for a module of several inputs.
        test_input_dtype: their dtype; their values are uniform in [0, 1).
        atol: the absolute tolerance of ``torch.allclose``, beside its relative one.
        random_seed: seed of the values.
        device: the device of the module, on which x is made.
    """
    fn: Any = module_in._fn if isinstance(module_in, InvertibleModuleWrapper) else module_in
    if not hasattr(fn, "inverse"):
        return False
    generator = torch.Generator().manual_seed(random_seed)
    inputs = [
        torch.rand(shape, generator=generator, dtype=test_input_dtype, device="cpu").to(device)
        for shape in _shapes(test_input_shape)
    ]
    replay = Replay(fn, inputs, preserve_rng_state=True)

    @torch.no_grad()
    def evaluated(function: Callable, values: Sequence[Tensor]) -> Sequence[Tensor]:
        with replay.again():
            result = function(*values)
        return result if isinstance(result, tuple) else (result,)

    outputs = evaluated(fn, inputs)
    _warn_of_sharing("forward", inputs, outputs)
    restored = evaluated(fn.inverse, outputs)
    _warn_of_sharing("inverse", outputs, restored)

    def alike(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
        return [x.shape for x in got] == [x.shape for x in wanted] and all(
            torch.allclose(a, b, atol=atol) for a, b in zip(got, wanted, strict=True)
        )

    return alike(restored, inputs) and alike(evaluated(fn, restored), outputs)


def _warn_of_sharing(method: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Warn where a result of ``method`` lies in the memory of an input, or where two results are the same values."""
    tensors = [y for y in outputs if isinstance(y, Tensor) and y.numel()]
    if any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for x in inputs for y in tensors):
        warnings.warn(
            f"a result of {method} shares memory with an input, as that of an identity function or a view: "
            "wrapping the module saves less memory; return new tensors, or leave the module unwrapped",
            stacklevel=3,
        )
    if len({(y.data_ptr(), y.shape, y.stride()) for y in tensors}) < len(tensors):
        warnings.warn(
            f"two results of {method} are the same tensor, so one of them is redundant: return copies if "
            "both are needed",
            stacklevel=3,
        )


def _shapes(shape: Sequence) -> Sequence[Sequence[int]]:
    shapes = [shape] if _is_shape(shape) else shape
    if not isinstance(shapes, (tuple, list)) or not all(map(_is_shape, shapes)):
        raise ValueError(
            f"test_input_shape must be a shape, such as (2, 4, 8, 8), or a sequence of shapes: got {shape!r}"
        )
    return shapes


def _is_shape(shape: object) -> bool:
    return isinstance(shape, (tuple, list)) and all(isinstance(size, int) for size in shape)


def _log_det_method(fn: nn.Module, name: str) -> Callable:
    if not callable(method := getattr(fn, name, None)):
        raise TypeError(
            f"{type(fn).__name__} has no {name}: give it one that returns the output and a value for each "
            "sample, as memcnn.models.log_det says"
        )
    return method


def _is_recorded(fn: nn.Module, inputs: Sequence) -> bool:
    """Return whether autograd would record ``fn(*inputs)`` and calls hooks for saved tensors."""
    return (
        torch.is_grad_enabled()
        and not is_storing()
        and not is_transformed()
        and any(isinstance(t, Tensor) and t.requires_grad for source in (inputs, fn.parameters()) for t in source)
    )


__getattr__ = migration.absent_names(__name__)
