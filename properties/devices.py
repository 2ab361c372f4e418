"""The devices that tests run on, and contexts for tests on a GPU."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import Tensor

NO_CUDA = "needs a CUDA device: run on a machine with one, with a CUDA build of torch"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@contextmanager
def reproducible_kernels() -> Iterator[None]:
    """Switch TF32 off and cuDNN's deterministic algorithms on, and restore both settings at the end.

    TF32 rounds to 11 bits, which the limits of float32 do not allow for. Some of cuDNN's other algorithms add in an
    order that changes from call to call, so that no two evaluations have the same bits.
    """
    cudnn = torch.backends.cudnn
    with ExitStack() as stack:
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for name in ("allow_tf32", "deterministic", "benchmark"):
            stack.callback(setattr, cudnn, name, getattr(cudnn, name))
        torch.set_float32_matmul_precision("highest")
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark = False, True, False
        yield


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Make every operation that waits for the GPU raise RuntimeError, and restore the previous mode at the end.

    PyTorch warns that the mode is a prototype, after it has set it. That warning alone is ignored.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


def rng_state() -> Tensor:
    """Return the state of PyTorch's CPU generator, followed by the default device's state if that is a GPU."""
    states = [torch.get_rng_state()]
    if torch.get_default_device().type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return torch.cat(states)
