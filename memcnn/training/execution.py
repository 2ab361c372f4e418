"""The execution of a recipe's steps: number formats, CUDA graphs, compilation, processes.

Two executions differ only by rounding, except for ``sync_batch_norm``. The execution is therefore not part of the
recipe; the record names it.

On a CPU, with the same number of threads, a run ends with the same bits however often it was stopped. On a GPU that
holds only with ``deterministic``. Without it, cuDNN chooses the fastest algorithms, which may differ from run to run
and may add in any order.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from memcnn.kernels import has_triton

PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The execution of a step; by default eager, in float32.

    Attributes:
        precision: of convolutions and matrix products. "float32"; "tf32", with inputs rounded to ten bits of mantissa;
            "bf16", under autocast. Weights, their updates, BatchNorm statistics, the loss and a RevNet's residual
            stream stay in float32.
        graph: capture the whole step once as a CUDA graph, and replay it with one launch a step.
        compile: run the model's forward pass in training mode through ``torch.compile``.
        sync_batch_norm: with several processes, normalise by the statistics of the whole batch instead of those of each
            process's share.
        deterministic: on a GPU, use only cuDNN's deterministic algorithms. By default cuDNN times its algorithms and
            takes the fastest, which may add in any order.
        narrow_convolutions: on a GPU, use our Triton kernels for narrow 3x3 convolutions and their gradients, for each
            shape only where they were measured to be faster. See ``memcnn.kernels``.
        fused_norms: on a GPU, in compiled code, compute each BatchNorm and ReLU in front of a convolution in few
            kernels, and reuse the statistics in the recomputation. See ``memcnn.kernels.batch_norm``.
        combine_kernels: on a GPU, in compiled code, launch small kernels that do not depend on each other as one, such
            as the casts of several weights (``combo_kernels`` of PyTorch's compiler).
    """

    precision: str = "float32"
    graph: bool = False
    compile: bool = False
    sync_batch_norm: bool = False
    deterministic: bool = False
    narrow_convolutions: bool = False
    fused_norms: bool = False
    combine_kernels: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, wanted one of {', '.join(PRECISIONS)}")

    def __str__(self) -> str:
        """Return the execution as records name it: "bf16, graph"."""
        names = (field.name for field in fields(self) if field.name != "precision")
        return ", ".join([self.precision, *(name.replace("_", "-") for name in names if getattr(self, name))])

    @classmethod
    def fastest(cls, device: torch.device, *, processes: int = 1, deterministic: bool = False) -> "Execution":
        """Return the fastest execution that was measured on this type of device.

        On a GPU: bf16, graph, compile and our kernels for narrow convolutions (``python -m bench.speed --fast`` and
        ``python -m bench.narrow_conv``); without Triton, bf16 and graph. On a CPU: the plain step. ``python -m
        bench.speed --clock cpu --tries`` (reports/bench/cpu/speed.md) found bfloat16 11 times slower. It found compiled
        code no faster than the plain step, within the spread of the measurement, after minutes of compiling.
        ``fused_norms`` and ``combine_kernels`` launch fewer kernels, but their time has not been measured yet.
        The kernel for outputs and input gradients of narrow convolutions has not been measured there either; each
        process uses it only after it has measured that it is faster.

        Args:
            device: the device that trains; only its type counts.
            processes: how many processes share each batch; only with one process can a step be captured.
            deterministic: choose only among executions that give the same bits each time.
        """
        if device.type != "cuda":
            return cls(deterministic=deterministic)
        compiles = has_triton()
        return cls(
            precision="bf16",
            graph=processes == 1,
            compile=compiles,
            deterministic=deterministic,
            narrow_convolutions=compiles and not deterministic,
        )

    def on(self, device: torch.device, *, processes: int = 1) -> tuple["Execution", list[str]]:
        """Return the execution without the options that have no effect on ``device``, and a sentence for each of them.

        Raises:
            ValueError: an option is impossible on the device, and without it the results would differ.
        """
        self._refuse_on(device, processes)
        here, is_gpu = f"on {device.type}", device.type == "cuda"
        without_triton = "without Triton: pip install triton" if is_gpu else f"{here}: its kernels need a GPU"
        changes: dict[str, Any] = {}
        sentences = []
        for applies, name, change, reason in (
            (not is_gpu and self.graph, "graph", {"graph": False}, f"{here}: there are no CUDA graphs there"),
            (not is_gpu and self.precision == "tf32", "tf32", {"precision": "float32"}, f"{here}: float32 is used"),
            (
                not is_gpu and self.deterministic,
                "deterministic",
                {"deterministic": False},
                f"{here}: its kernels are deterministic anyway",
            ),
            (
                self.narrow_convolutions and not (is_gpu and has_triton()),
                "narrow-convolutions",
                {"narrow_convolutions": False},
                without_triton,
            ),
            (
                self.fused_norms and not (is_gpu and has_triton() and self.compile),
                "fused-norms",
                {"fused_norms": False},
                without_triton if not (is_gpu and has_triton()) else "without --compile",
            ),
            (
                self.combine_kernels and not (is_gpu and self.compile),
                "combine-kernels",
                {"combine_kernels": False},
                "without --compile" if is_gpu else f"{here}: the compiler generates other code there",
            ),
            (
                self.sync_batch_norm and processes == 1,
                "sync-batch-norm",
                {"sync_batch_norm": False},
                "with one process: it has the whole batch",
            ),
        ):
            if applies:
                changes |= change
                sentences.append(f"{name} has no effect {reason}")
        return replace(self, **changes), sentences

    def _refuse_on(self, device: torch.device, processes: int) -> None:
        """Raise ValueError for an option that is impossible on the device and that changes the results."""
        is_gpu = device.type == "cuda"
        if is_gpu and self.deterministic and self.narrow_convolutions:
            raise ValueError(
                "got deterministic and narrow-convolutions: the choice between kernels depends on measured times; "
                "leave out the one or the other"
            )
        if self.sync_batch_norm and processes > 1 and not is_gpu:
            raise ValueError(
                f"sync-batch-norm: PyTorch synchronises BatchNorm on GPUs only, not on {device.type}; leave it out, "
                "and each process normalises by its own share of the batch"
            )
        if self.graph and processes > 1 and is_gpu:
            raise ValueError("graph: a step is captured for one process only; leave it out under torchrun")

    def autocast(self, device: torch.device) -> AbstractContextManager:
        """Return the context in which a forward pass runs at this precision."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def settings(self, device: torch.device) -> Iterator[None]:
        """Apply PyTorch's settings for this execution, and restore the previous ones on exit."""
        with ExitStack() as stack:
            if device.type == "cuda":
                cudnn = torch.backends.cudnn
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                for name in ("allow_tf32", "deterministic", "benchmark"):
                    stack.callback(setattr, cudnn, name, getattr(cudnn, name))
                torch.set_float32_matmul_precision("high" if self.precision == "tf32" else "highest")
                cudnn.allow_tf32 = self.precision == "tf32"
                cudnn.deterministic, cudnn.benchmark = self.deterministic, not self.deterministic
            if self.compile:  # a model has more kinds of branches than the default allows
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield
