"""One run in several processes, which torchrun starts on one or more machines. Each takes a share of every batch.

    torchrun --nproc-per-node 2 -m memcnn.train revnet38 cifar10

Only rank 0 reads and writes the run's folder: the others may be on machines without it. If one process decides to stop,
all stop at the same iteration.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from memcnn.training.execution import Execution

T = TypeVar("T")
LOST = ("onnection closed", "onnection reset", "onnect timeout", "roken pipe", "imed out", "NCCL", "gloo")
"""Parts of PyTorch's error messages after another process has ended. These errors have no type of their own."""


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or cannot be reached, so that this one cannot continue."""


class World:
    """The processes of one run, and the number of this one. By default there is only this one.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: number of this process on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    @property
    def is_first(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """Return the slice of ``count`` items that this process handles: ceil(count / size), while any are left."""
        each = -(-count // self.size)
        return slice(min(self.rank * each, count), min((self.rank + 1) * each, count))

    def on_rank_0(self, function: Callable[[], T]) -> T:
        """Run ``function()`` on rank 0, and return its result, or raise its exception, in every process."""
        if self.size == 1:
            return function()
        outcome: list = [None, None]
        if self.is_first:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def in_turn(self, function: Callable[[], T]) -> T:
        """Run ``function()`` on rank 0, then in one process of each other machine, then in the rest.

        So later processes can read files that an earlier one has written. If one process raises, all raise its error.

        Returns:
            This process's own result.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        result: Any = None
        error: Exception | None = None
        for now in range(3):
            if now == turn:
                try:
                    result = function()
                except Exception as raised:
                    error = raised
            if errors := [one for one in self.all_gather(error) if one is not None]:
                raise errors[0]
        return result

    def first_reason(self, reason: str | None) -> str | None:
        """Return the reason of the first process that has one, in every process; None if none has one."""
        if self.size == 1:
            return reason
        someone = torch.tensor(reason is not None, dtype=torch.int)
        dist.all_reduce(someone, dist.ReduceOp.MAX)
        return next(one for one in self.all_gather(reason) if one is not None) if someone else None

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Return the sum of all processes' x."""
        total = x.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def broadcast_from_rank_0(self, tensors: Iterable[Tensor]) -> None:
        """Copy the values of rank 0 into each tensor, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wrap_in_ddp(self, model: nn.Module, execution: Execution) -> nn.Module:
        """Return a module that trains the model in every process, with gradients averaged over them."""
        if self.size == 1:
            return model
        if execution.sync_batch_norm:
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    @contextmanager
    def detect_lost_process(self) -> Iterator[None]:
        """Raise ProcessLost for PyTorch's errors about a process that is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.size > 1 and any(words in str(error) for words in LOST):
                raise ProcessLost(
                    f"process {self.rank} of {self.size}: another process has ended or cannot be reached, so training "
                    "stopped. Run the same command again to resume from the last checkpoint"
                ) from error
            raise


@contextmanager
def process_group(device: str | None) -> Iterator[World]:
    """Connect the processes that torchrun started, for as long as the context lasts.

    Args:
        device: the device that the user chose; "cpu" connects the processes by gloo alone, even if there are GPUs.
    Yields:
        The world of all processes, or of this one alone.
    """
    if dist.is_available() and dist.is_initialized():
        yield _world()
    elif launched() and int(os.environ["WORLD_SIZE"]) > 1:
        gpus = torch.cuda.is_available() and device != "cpu"
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        try:
            yield _world()
        finally:
            dist.destroy_process_group()
    else:
        yield World()


def _world() -> World:
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))


def launched() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def is_rank_0_or_alone() -> bool:
    """Return whether this process prints the messages that are the same in all processes of its run."""
    return not launched() or os.environ["RANK"] == "0"
