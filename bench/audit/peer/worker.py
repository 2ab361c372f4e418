"""One contender in its own process: the methods of ``Contender`` answer the questions of ``bench.worker``."""

import importlib
import json
import os
import select
import signal
import sys
import time
from functools import partial

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .behaviours import BEHAVIOURS, evaluations, examine
from .chains import chain, conv_branch
from .shared import memory

LIMIT_SECONDS = 60.0


class Contender:
    """A contender, and the chain on which its time, memory and work are measured.

    Args:
        name: a key of ``CONTENDERS``.
    """

    def __init__(self, name: str):
        self.build_chain = partial(chain, name)
        self.model: nn.Module | None = None
        self.data = self.output_gradient = torch.empty(0)
        torch.set_num_threads(1)

    def hello(self) -> dict:
        """Import everything that the contender needs, before any fork, and return versions."""
        importlib.import_module("sympy")  # the backward pass of a torch.autograd.Function imports it
        self.build_chain([conv_branch(2), conv_branch(2)])(torch.ones(1, 4, 2, 2))
        return {"torch": torch.__version__, "python": sys.version.split()[0], "threads": torch.get_num_threads()}

    def behaviour(self, title: str) -> dict:
        """Run one behaviour in a fork with a time limit, and return its outcome."""
        return in_a_fork(partial(examine, self.build_chain, BEHAVIOURS[title]))

    def evaluations(self) -> dict:
        """Return the evaluations of a branch in the forward and the backward pass of a step."""
        return in_a_fork(partial(evaluations, self.build_chain))

    def build(self, blocks: int, batch: int, channels: int, side: int) -> dict:
        """Build a chain and its batch of shape (batch, channels, side, side)."""
        torch.manual_seed(0)
        self.model = self.build_chain([conv_branch(channels // 2) for _ in range(2 * blocks)])
        self.data, self.output_gradient = (torch.randn(batch, channels, side, side) for _ in range(2))
        return {}

    def step(self, repeat: int = 1) -> dict:
        """Return wall-clock seconds and CPU seconds of each of ``repeat`` training steps."""
        seconds, cpu_seconds = zip(*(self._timed() for _ in range(repeat)), strict=True)
        return {"seconds": seconds, "cpu_seconds": cpu_seconds}

    def memory(self) -> dict:
        """Return the bytes of the parameters' gradients, and a step's peak above parameters, input, output gradient."""
        peak_bytes = memory.allocator_peak_bytes(self._fresh_step())
        return {"peak_bytes": peak_bytes, "gradient_bytes": sum(p.nbytes for p in self.model.branches.parameters())}

    def work(self) -> dict:
        """Return the floating-point operations of the convolutions of a step."""
        with Work() as work:
            self._fresh_step()()
        return {"flops": work.flops}

    def _timed(self) -> tuple[float, float]:
        run = self._fresh_step()
        start, cpu_start = time.perf_counter(), time.process_time()
        run()
        return time.perf_counter() - start, time.process_time() - cpu_start

    def _fresh_step(self):
        """Return a function that runs forward and backward on a new leaf, without earlier gradients."""
        self.model.zero_grad()
        x = self.data.clone().requires_grad_()
        return lambda: self.model(x).backward(self.output_gradient)


class Work(TorchDispatchMode):
    """Counts the operations of convolutions by torch's formulas. (torch's FlopCounterMode fails inside RevTorch.)"""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result


def in_a_fork(function) -> dict:
    """Run ``function`` in a forked process, so that a crash or a hang stays there. Return its result or the error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = function()
        except BaseException as error:
            answer = {"outcome": "error", "detail": f"{type(error).__name__}: {error}", "error": None}
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        if not select.select([stream], [], [], LIMIT_SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
        data = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if data:
        return json.loads(data)
    why = f"no answer within {LIMIT_SECONDS:g} s" if status == -signal.SIGKILL else f"ended by signal {-status}"
    return {"outcome": "error", "detail": why, "error": None}
