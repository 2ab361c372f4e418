"""CUDA graphs simulated on a CPU: a replay repeats the captured operations on the same memory, without Python.

Like a CUDA graph, a replay only knows the tensors of the capture. A number that Python computed keeps its captured
value, and the replay does not see tensors that were created later.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorded(TorchDispatchMode):
    """Replaces ``torch.cuda.CUDAGraph``. It records every operation for ``replay``."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def capture_begin(self, *, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local", "other threads may call CUDA during a capture"
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

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


class Stream:
    """Replaces ``torch.cuda.Stream``. It records the streams for which it waited."""

    def __init__(self) -> None:
        self.waited: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        self.waited.append(other)


class Streams:
    """The current stream and the default stream of the only device."""

    def __init__(self) -> None:
        self.default = self.current = Stream()

    @contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        previous, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = previous


@contextmanager
def graphs_on_cpu(patch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """Capture graphs on the CPU inside the context. Yield the captured graphs, each with the stream of its capture.

    Waiting for the whole device is an error, because other runs may be using it.
    """
    graphs: list[Recorded] = []
    streams = Streams()

    class Graph(Recorded):
        def capture_begin(self, **options) -> None:
            assert streams.current is not streams.default, "CUDA cannot capture the default stream"
            self.stream = streams.current
            graphs.append(self)
            super().capture_begin(**options)

    def refuse(*arguments) -> None:
        raise AssertionError("the code waits for the whole device")

    for name, value in (
        ("device", nullcontext),
        ("Stream", Stream),
        ("current_stream", lambda *device: streams.current),
        ("default_stream", lambda *device: streams.default),
        ("stream", streams.use),
        ("CUDAGraph", Graph),
        ("synchronize", refuse),
        ("empty_cache", refuse),
    ):
        patch.setattr(torch.cuda, name, value)
    yield graphs
