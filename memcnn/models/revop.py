"""The names of MemCNN 1.5 for reversible blocks, and the check that a module is invertible.

``wrapper`` and ``sequence`` define the blocks themselves; ``memcnn.engine`` rebuilds their activations.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states  # noqa: F401 - names of MemCNN 1.5

from memcnn import migration
from memcnn.engine.replay import Replay
from memcnn.models.additive import AdditiveCoupling
from memcnn.models.affine import AffineCoupling
from memcnn.models.coupling import Coupling
from memcnn.models.sequence import HalvesPassedOn, ReversibleSequential  # noqa: F401 - pickles of earlier commits name it here
from memcnn.models.wrapper import InvertibleModuleWrapper

__all__ = [
    "InvertibleModuleWrapper",
    "ReversibleBlock",
    "ReversibleSequential",
    "create_coupling",
    "is_invertible_module",
]


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

    Returns:
        True if both hold within the tolerance; False otherwise, and for a module without ``inverse``.

    Raises:
        ValueError: ``test_input_shape`` is neither a shape nor a sequence of shapes.
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
    """Return ``test_input_shape`` as a sequence of shapes."""
    shapes = [shape] if _is_shape(shape) else shape
    if not isinstance(shapes, (tuple, list)) or not all(map(_is_shape, shapes)):
        raise ValueError(
            f"test_input_shape must be a shape, such as (2, 4, 8, 8), or a sequence of shapes: got {shape!r}"
        )
    return shapes


def _is_shape(shape: object) -> bool:
    return isinstance(shape, (tuple, list)) and all(isinstance(size, int) for size in shape)


__getattr__ = migration.absent_names(__name__)
