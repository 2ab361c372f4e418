"""A wrapped block: a module that rebuilds its activations in backward instead of storing them.

``memcnn.engine`` does the rebuilding.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memcnn import migration
from memcnn.engine.chain import is_storing
from memcnn.engine.couple import recording
from memcnn.engine.opaque import call_opaque
from memcnn.engine.torch_private import is_transformed
from memcnn.models.coupling import Coupling
from memcnn.models.keywords import keywords_taken

uncompiled = torch.compiler.disable(
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

    Raises:
        TypeError: ``fn`` is not a module with an ``inverse``.
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
        """Call ``run``, and let ``undo`` rebuild its inputs in backward if autograd records the call."""
        if self.disable or not is_recorded(self._fn, inputs):
            return run(*inputs, **kwargs)
        return self._run_recorded(run, undo, inputs, kwargs, keep_input, log_det)

    @uncompiled
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


def _log_det_method(fn: nn.Module, name: str) -> Callable:
    """Return the method ``name`` of the module; raise a TypeError if it has none."""
    if not callable(method := getattr(fn, name, None)):
        raise TypeError(
            f"{type(fn).__name__} has no {name}: give it one that returns the output and a value for each "
            "sample, as memcnn.models.log_det says"
        )
    return method


def is_recorded(fn: nn.Module, inputs: Sequence) -> bool:
    """Return whether autograd records ``fn(*inputs)`` and calls the engine's hooks for saved tensors."""
    return (
        torch.is_grad_enabled()
        and not is_storing()
        and not is_transformed()
        and any(isinstance(t, Tensor) and t.requires_grad for source in (inputs, fn.parameters()) for t in source)
    )
