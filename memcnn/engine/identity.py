"""The version and the storage of a tensor, which show whether it was modified or given other values."""

from torch import Tensor
from torch.nn.parameter import is_lazy


def identity(x: Tensor) -> tuple[int, int]:
    """Return the version and the storage of x. One changes if x is modified in place, the other by ``x.data = ...``."""
    return x._version, x.untyped_storage()._cdata


def has_no_version(x: Tensor) -> bool:
    """Return whether x was made under ``torch.inference_mode()``, or is a parameter of such a tensor."""
    try:
        _ = x._version
    except RuntimeError:
        return True
    return False


def refuse_unless_lazy(x: Tensor, what: str) -> None:
    """Raise a RuntimeError for a tensor without a version, unless a lazy layer has yet to initialise it."""
    if not is_lazy(x):
        raise RuntimeError(
            f"{what} was made under torch.inference_mode(), so that autograd cannot use it: make or "
            "load the module outside of inference_mode, or under torch.no_grad()"
        )


def modified_input_error(name: str, fix: str = "make its first operation an out-of-place one") -> RuntimeError:
    """Return the error for a module that has changed its input."""
    return RuntimeError(f"{name} modifies its input in place, so that the block cannot be inverted: {fix}")
