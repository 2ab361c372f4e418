"""A query of autocast's state that ``torch.compile`` can trace."""

import torch

# Called once at import: PyTorch 2.11 cannot trace is_autocast_available, so each call would break a compiled graph.
_KINDS = frozenset(
    kind
    for kind in ("cpu", "cuda", "hpu", "maia", "mps", "mtia", "xpu", "xla")
    if torch.amp.is_autocast_available(kind)
)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the dtype of autocast on a type of device; None if autocast is off or does not exist there.

    Args:
        kind: the type of a device, such as ``"cuda"``.
    """
    if kind in _KINDS and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
