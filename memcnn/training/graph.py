"""A whole training step as a CUDA graph: its kernels are launched together, without Python in between."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP_STEPS = 3


@torch.no_grad()
def captured(update: Callable[[], None], state: Sequence[Tensor]) -> Callable[[], None]:
    """What does on the GPU what `update()` does there, each time it is called.

    update: reads and writes tensors that stay where they are, and never waits for the GPU. It is run a few times first,
    for libraries and autograd to set themselves up; `state`, all that it changes, is put back as it was.
    The default generator of the GPU goes on from one replay to the next as it would without the graph.
    """
    device = state[0].device
    before = [tensor.clone() for tensor in state]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.enable_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                update()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):  # the same one, on which autograd's leaves now are
            update()
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    return graph.replay
