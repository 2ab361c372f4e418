"""Arguments of a module that are not rebuilt: they are stored in the forward pass and used again in backward."""

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


class Arguments:
    """The positional and keyword arguments of the forward evaluation.

    Lists, tuples and dictionaries are copied, so that changing them before backward has no effect. Tensors in them are
    not copied. If one was modified in place, ``read`` raises a RuntimeError.

    Args:
        name: the name of the module, for messages.
        positional: positional arguments to store.
        keywords: keyword arguments to store.
    """

    def __init__(self, name: str, positional: Sequence, keywords: Mapping[str, object]):
        self.name = name
        self.is_empty = not positional and not keywords
        self._positional, self._keywords = ([], {}) if self.is_empty else _copy((list(positional), dict(keywords)))
        tensors = [] if self.is_empty else [t for t in tree_leaves((positional, keywords)) if isinstance(t, Tensor)]
        for tensor in tensors:
            refuse_inference(tensor, f"an argument of {name}")
        self._versions = [(t, t._version) for t in tensors]

    def read(self) -> tuple[list, dict[str, object]]:
        """Return the arguments. Raise a RuntimeError if a tensor among them was modified in place."""
        for tensor, version in self._versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"an argument of {self.name}, shape {tuple(tensor.shape)}, was modified in place "
                    "between forward and backward, which uses it again: use an out-of-place operation"
                )
        return _copy((self._positional, self._keywords)) if not self.is_empty else ([], {})


def refuse_inference(x: Tensor, what: str) -> None:
    """Raise a RuntimeError if x was made under ``torch.inference_mode()``."""
    if x.is_inference():
        raise RuntimeError(
            f"{what}, shape {tuple(x.shape)}, was made under torch.inference_mode(), so that autograd "
            "cannot use it: give the block x.clone(), or make x under torch.no_grad()"
        )


def _copy(values: tuple) -> tuple:
    """Return ``values`` with new lists, tuples and dictionaries, and the same leaves."""
    return tree_map(lambda value: value, values)
