"""Fake tensors whose operators return storages of the size that the real operators return.

PyTorch describes each operator by a fake kernel, which computes the shapes of its results. For two operators on the CPU
that is not enough: oneDNN's LSTM layer returns a workspace for backward, which the fake kernel leaves empty, and
``EmbeddingBag`` returns a tensor whose storage has one element more than the tensor.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map_only

_ASKED = {torch.ops.aten.mkldnn_rnn_layer.default, torch.ops.aten._embedding_bag.default}
"""Operators on the CPU whose fake kernels return too few bytes."""
_UNKNOWN = {torch.ops.aten._cudnn_rnn.default, torch.ops.aten.miopen_rnn.default}
"""Operators on a GPU that do the same."""


class FakeMode(FakeTensorMode):
    """A ``FakeTensorMode`` that runs an operator on zeros, once for each shape, if its fake kernel lacks bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[str, list[int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> Any:
        results: Any = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func in _UNKNOWN:
            warn_of_gpu_rnn()
        if func not in _ASKED or results[0].device.type != "cpu":
            return results
        key = str((func, torch.is_grad_enabled(), tree_map_only(Tensor, _description, (args, kwargs))))
        if key not in self._sizes:
            self._sizes[key] = _real_sizes(func, args, kwargs or {})
        with self:
            return tuple(_of_size(result, size) for result, size in zip(results, self._sizes[key], strict=True))


def warn_of_gpu_rnn() -> None:
    """Warn that the memory of recurrent layers on a GPU is not predicted."""
    warnings.warn(
        "the prediction for an LSTM, a GRU or an RNN on a GPU is wrong: what such a layer saves for backward there, "
        "only the GPU's library knows; measure a step on the GPU",
        stacklevel=2,
    )


def _description(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype


def _real_sizes(func: Any, args: Sequence[object], kwargs: Mapping[str, object]) -> list[int]:
    """Return the bytes of the storages of the results of ``func`` for real arguments of zeros."""

    def zeros(tensor: Tensor) -> Tensor:
        return torch.zeros((), dtype=tensor.dtype).new_zeros(tensor.shape)

    with unset_fake_temporarily():
        real_args, real_kwargs = tree_map_only(Tensor, zeros, (tuple(args), dict(kwargs)))
        results = func(*real_args, **real_kwargs)
        return [0 if result is None else result.untyped_storage().nbytes() for result in results]


def _of_size(result: Tensor, size: int) -> Tensor:
    """Return ``result``, or a tensor like it in a storage of ``size`` bytes."""
    if result.untyped_storage().nbytes() == size:
        return result
    storage = torch.empty(size // result.element_size(), dtype=result.dtype)
    return storage.as_strided(result.shape, result.stride()) if result.numel() else storage
