"""Work on a GPU as a CUDA graph: all its kernels are launched together, without Python in between."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

WARM_UP_CALLS = 3


@torch.no_grad()
def captured(update: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Capture what ``update()`` does on the GPU, and return a function that does the same each time it is called.

    The work is captured on the caller's current stream (on a side stream if that is the default stream, which cannot be
    captured), and only that stream is waited for. So runs that have a stream each can capture and replay while the
    others' kernels run. Each graph has a memory pool of its own, because two graphs that share one must never run at
    the same time. Replay the graph on the stream on which it was captured, or after waiting for it.

    Args:
        update: reads and writes tensors that stay where they are, and never waits for the GPU. It is called a few times
            first, so that libraries and autograd set themselves up; autograd, unless ``update`` disables it, is on.
        state: all tensors that ``update`` changes, at least one; they are restored afterwards.
    Returns:
        ``replay``. The GPU's default generator advances from one replay to the next as it would without the graph.
    """
    before = [tensor.clone() for tensor in state]
    with torch.cuda.device(state[0].device):
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if current == torch.cuda.default_stream() else current
        stream.wait_stream(current)
        with torch.cuda.stream(stream), torch.enable_grad():
            for _ in range(WARM_UP_CALLS):
                update()
            graph = _capture(update)  # on the warm-up's stream: autograd has bound the parameters to it
        current.wait_stream(stream)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    return graph.replay


def _capture(update: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Capture ``update()`` on the current stream.

    This is ``torch.cuda.graph`` without its device-wide synchronisation and its emptying of caches, for which other
    runs in this process would have to wait. The mode "thread_local" lets other threads, such as one that copies a
    checkpoint, go on calling CUDA meanwhile; the default would make their calls fail.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        update()
    except BaseException:
        with suppress(RuntimeError):  # the error to show is that of the update
            graph.capture_end()
        raise
    graph.capture_end()
    return graph
