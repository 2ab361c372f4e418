"""A stand-in for torch.cuda's graphs on a CPU: what is captured is run again on the same memory, without Python.

As with a CUDA graph, a replay knows the tensors of the capture and nothing else: a number that Python computed stays
what it was then, and a tensor that came later is not seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    """In the place of torch.cuda.CUDAGraph: every operation within it, for ``replay``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextmanager
def stand_in(patch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Within it graphs can be captured on the CPU; the graphs that were."""
    graphs: list[Recorded] = []

    @contextmanager
    def capturing(graph: Recorded, stream: object) -> Iterator[None]:
        graphs.append(graph)
        with graph:
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (
        ("device", nullcontext),
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda stream: nullcontext()),
        ("CUDAGraph", Recorded),
        ("graph", capturing),
    ):
        patch.setattr(torch.cuda, name, value)
    yield graphs
