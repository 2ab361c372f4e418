"""Capture work on a GPU as a CUDA graph, which launches all of its kernels together, without Python in between."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

WARM_UP_CALLS = 3


@torch.no_grad()
def captured(update: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """Capture the GPU work of ``update()``, and return a function that replays it.

    The work is captured on the caller's current stream (on a side stream if that is the default stream, which cannot be
    captured), and this function waits for that stream alone. Runs with a stream each can therefore capture and replay
    while kernels of the others run. Each graph has a memory pool of its own, because two graphs that share one must
    never run at the same time. Replay the graph on the stream on which it was captured, or after waiting for it.

    Args:
        update: a function that reads and writes the same tensors at each call, and never waits for the GPU. It is
            called a few times first, so that libraries and autograd initialise. Gradients are enabled.
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

    ``torch.cuda.graph`` would also synchronise the device and empty caches, and other runs in this process would have
    to wait for that. The mode "thread_local" lets other threads, such as one that copies a checkpoint, call CUDA
    meanwhile; with the default mode their calls would fail.
    """
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="thread_local")
    try:
        update()
    except BaseException:
        with suppress(RuntimeError):  # raise the error of update() instead
            graph.capture_end()
        raise
    graph.capture_end()
    return graph
