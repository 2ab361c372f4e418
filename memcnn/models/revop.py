"""Reversible blocks: modules that rebuild their activations in backward instead of storing them.

How it works is told in ``memcnn.models.engine``.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.affine import AffineCoupling
from memcnn.models.coupling import Coupling
from memcnn.models.tape import call, recording

__all__ = ["InvertibleModuleWrapper", "ReversibleBlock", "ReversibleSequential", "create_coupling"]


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
    """

    def __init__(self, fn: nn.Module, keep_input: bool = False, keep_input_inverse: bool = False,
                 num_bwd_passes: int = 1, disable: bool = False, preserve_rng_state: bool = True):
        super().__init__()
        if not isinstance(fn, nn.Module) or not callable(getattr(fn, "inverse", None)):
            raise TypeError(f"fn must be an nn.Module with forward and inverse: got {type(fn).__name__}; give it an "
                            "inverse method, or build a coupling from it, such as AdditiveCoupling(fn)")
        self.disable = disable
        self.keep_input = keep_input
        self.keep_input_inverse = keep_input_inverse
        self.num_bwd_passes = num_bwd_passes
        self.preserve_rng_state = preserve_rng_state
        self._fn = fn

    def forward(self, *xin, **kwargs):
        """``fn(*xin, **kwargs)``. Floating-point tensors in ``xin`` are what ``fn.inverse`` must give back."""
        return self._run(self._fn, self._fn.inverse, xin, kwargs, self.keep_input)

    def inverse(self, *yin, **kwargs):
        """``fn.inverse(*yin, **kwargs)``, differentiable with the same savings."""
        return self._run(self._fn.inverse, self._fn, yin, kwargs, self.keep_input_inverse)

    def _run(self, run, undo, inputs, kwargs, keep_input):
        if self.disable or not _is_recorded(self._fn, inputs):
            return run(*inputs, **kwargs)
        if isinstance(self._fn, Coupling):
            with recording(preserve_rng_state=self.preserve_rng_state, keep_input=keep_input):
                return run(*inputs, **kwargs)
        return call(run, undo, self._fn, inputs, kwargs,
                    preserve_rng_state=self.preserve_rng_state, keep_input=keep_input)


class ReversibleBlock(InvertibleModuleWrapper):
    """A wrapped coupling of F and G; see ``create_coupling`` and ``InvertibleModuleWrapper`` for the arguments."""

    def __init__(self, Fm: nn.Module, Gm: nn.Module | None = None, coupling: str = "additive", keep_input: bool = False,
                 keep_input_inverse: bool = False, implementation_fwd: int | None = None,
                 implementation_bwd: int | None = None, adapter: Callable[[nn.Module], nn.Module] | None = None,
                 split_dim: int = 1, preserve_rng_state: bool = True):
        super().__init__(create_coupling(Fm, Gm, coupling, implementation_fwd, implementation_bwd, adapter, split_dim),
                         keep_input=keep_input, keep_input_inverse=keep_input_inverse,
                         preserve_rng_state=preserve_rng_state)


class ReversibleSequential(nn.Sequential):
    """Reversible modules one after the other, of which only the end's output is stored for backward.

    Args:
        *modules: couplings, wrapped blocks, or any modules with ``forward`` and ``inverse`` that map one tensor to one.
    """

    def __init__(self, *modules: nn.Module):
        super().__init__(*(m if isinstance(m, _REVERSIBLE) else InvertibleModuleWrapper(m) for m in modules))

    def inverse(self, y: Tensor) -> Tensor:
        """x with ``self(x) = y``, differentiable with the same savings."""
        for module in reversed(self):
            y = module.inverse(y)
        return y


_REVERSIBLE = (InvertibleModuleWrapper, ReversibleSequential)


def create_coupling(Fm: nn.Module, Gm: nn.Module | None = None, coupling: str = "additive",
                    implementation_fwd: int | None = None, implementation_bwd: int | None = None,
                    adapter: Callable[[nn.Module], nn.Module] | None = None, split_dim: int = 1) -> Coupling:
    """The coupling named ``coupling``, 'additive' or 'affine', of the modules F and G (G: a copy of F if not given).

    ``adapter`` is for an affine coupling alone. NotImplementedError for another name.
    """
    if coupling == "affine":
        return AffineCoupling(Fm, Gm, adapter, implementation_fwd, implementation_bwd, split_dim)
    if coupling != "additive":
        raise NotImplementedError(f"unknown coupling {coupling!r}: choose 'additive' or 'affine'")
    return AdditiveCoupling(Fm, Gm, implementation_fwd, implementation_bwd, split_dim)


def _is_recorded(fn: nn.Module, inputs: tuple) -> bool:
    """Whether autograd would record ``fn(*inputs)``."""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for source in (inputs, fn.parameters()) for t in source)
