"""How the steps of a recipe are executed: number formats, graphs, compilation, processes.

It is no part of the recipe, since but for rounding it changes nothing that the recipe computes; the record names it.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

PRECISIONS = ("float32", "tf32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """By default the plain step.

    precision: of convolutions and matrix products. "float32"; "tf32", inputs rounded to ten bits of mantissa; "bf16",
    under autocast. Weights, their updates, BatchNorm statistics, the loss and a RevNet's residual stream stay float32.
    graph: the whole step is captured once as a CUDA graph and then replayed, with one launch a step.
    compile: the model's training pass through torch.compile.
    sync_batch_norm: of several processes, normalise by the statistics of the whole batch, not of each one's share.
    """

    precision: str = "float32"
    graph: bool = False
    compile: bool = False
    sync_batch_norm: bool = False

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: got {self.precision!r}, wanted one of {', '.join(PRECISIONS)}")

    def __str__(self) -> str:
        """What the record says: "bf16, graph"."""
        words = [name.replace("_", "-") for name in ("graph", "compile", "sync_batch_norm") if getattr(self, name)]
        return ", ".join([self.precision, *words])

    def on(self, device: torch.device, *, processes: int = 1) -> tuple["Execution", list[str]]:
        """What has an effect on `device`, and a sentence for each option that has none.

        What would only be slower is left out; what would compute something else than was asked for is a ValueError.
        """
        effective, without_effect = self, []
        if device.type != "cuda" and self.graph:
            effective = replace(effective, graph=False)
            without_effect.append(f"graph has no effect on {device.type}: there are no CUDA graphs there")
        if device.type != "cuda" and self.precision == "tf32":
            effective = replace(effective, precision="float32")
            without_effect.append(f"tf32 has no effect on {device.type}: float32 is used")
        if processes == 1 and self.sync_batch_norm:
            effective = replace(effective, sync_batch_norm=False)
            without_effect.append("sync-batch-norm has no effect with one process, which has the whole batch")
        if effective.sync_batch_norm and device.type != "cuda":
            raise ValueError(
                f"sync-batch-norm: PyTorch synchronises BatchNorm on GPUs only, not on {device.type}; leave it out, "
                "and each process normalises by its own share of the batch"
            )
        if effective.graph and processes > 1:
            raise ValueError("graph: a step is captured for one process only; leave it out under torchrun")
        return effective, without_effect

    def autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @contextmanager
    def settings(self, device: torch.device) -> Iterator[None]:
        """PyTorch's settings for this execution, put back at the end; kernels on a GPU are deterministic ones."""
        with ExitStack() as stack:
            if device.type == "cuda":
                cudnn, tf32 = torch.backends.cudnn, self.precision == "tf32"
                stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
                stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
                stack.callback(setattr, cudnn, "deterministic", cudnn.deterministic)
                torch.set_float32_matmul_precision("high" if tf32 else "highest")
                cudnn.allow_tf32, cudnn.deterministic = tf32, True
            if self.compile:  # a model has more kinds of branches than the default allows
                stack.enter_context(torch._dynamo.config.patch(recompile_limit=64))
            yield
