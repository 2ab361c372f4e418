"""Measure the memory of a training step of the six networks, and write it to reports/bench/<device>/memory.csv.

    python -m bench.measured_memory                                   all six, batch 100, float32 and bf16
    python -m bench.measured_memory --networks resnet32 --batch 10    one network, a smaller batch

On a GPU the bytes are those that CUDA's allocator gives out, after one step that loads libraries and lets cuDNN choose
its algorithms. On a CPU they are those of all tensors. The table of results and reports/activations.md show the
measurements at batch 100 on a GPU.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import folders
from bench.networks import add_networks_option
from memcnn import cli
from memcnn.memory import StepMemory, TensorMeter, measure_step_memory
from memcnn.models.resnet import MODELS
from memcnn.training.execution import Execution
from memcnn.training.files import write_by_rename
from memcnn.training.options import count
from memcnn.training.recipe import PUBLISHED
from reports.tables import GPU_PRECISIONS, MEMORY_FILE


def row(network: str, precision: str, *, engine: bool, batch: int, device: torch.device) -> dict:
    """Measure one network in bytes.

    Args:
        network: one of the six.
        precision: "float32", or "bf16" for bfloat16 autocast.
        engine: False runs the reversible units by plain autograd.
        batch: images of a step.
        device: where the step runs.

    Returns:
        A row of memory.csv. ``activation_bytes`` is the highest total during forward and backward, without model,
        gradients and batch, as in the record of a run. ``peak_bytes`` adds parameters, buffers and gradients.
        ``held_bytes`` is the total after the forward pass, without the model but with the batch: the published
        quantity.
    """
    execution = Execution(precision=precision)
    model = MODELS[network](disable=not engine).to(device, memory_format=torch.channels_last).train()

    def make_batch() -> tuple[Tensor, Tensor]:
        images = torch.randn(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
        return images, torch.zeros(batch, dtype=torch.int64, device=device)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        with execution.autocast(device):
            return F.cross_entropy(model(images), labels)

    with execution.settings(device):
        found = _step_memory(model, make_batch(), loss_of)
        held_bytes = held_after_forward(make_batch, loss_of, device)
    return {
        "model": network, "precision": precision, "engine": engine, "batch": batch,
        "activation_bytes": found.activation_bytes, "held_bytes": held_bytes, "peak_bytes": found.peak_bytes,
        "parameter_bytes": found.parameter_bytes,
    }  # fmt: skip


def _step_memory(model: nn.Module, inputs: tuple[Tensor, Tensor], loss_of: Callable[..., Tensor]) -> StepMemory:
    return measure_step_memory(model, lambda: loss_of(*inputs).backward())


def held_after_forward(
    make_batch: Callable[[], tuple[Tensor, Tensor]], loss_of: Callable[..., Tensor], device: torch.device
) -> int:
    """Return the bytes held after the forward pass: batch, output, loss and the tensors saved for backward."""
    if device.type != "cuda":
        with TensorMeter() as meter:
            inputs = make_batch()
            loss = loss_of(*inputs)
            held_bytes = meter.current_bytes
    else:
        before = torch.cuda.memory_allocated(device)
        inputs = make_batch()
        loss = loss_of(*inputs)
        held_bytes = torch.cuda.memory_allocated(device) - before
    del loss, inputs  # they keep the counted tensors alive until here
    return held_bytes


def measure(networks: Sequence[str], *, batch: int, device: torch.device) -> pd.DataFrame:
    """Return a row for each network and precision, and for RevNets also with the engine on and off."""
    found = folders.environment(device, "none")
    where = {
        "device_type": device.type, "device": found["device"]["name"],
        "meter": "allocator" if device.type == "cuda" else "tensors",
        **{name: found["software"].get(name) for name in ("torch", "cuda", "cudnn", "python")},
        "commit": found["commit"], "clean": found["clean"], "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
    }  # fmt: skip
    rows = []
    for network in networks:
        for engine in (True, False) if network.startswith("revnet") else (True,):
            for precision in GPU_PRECISIONS:
                print(f"{network}, {precision}{'' if engine else ', engine off'} ...", file=sys.stderr, flush=True)
                rows.append({**row(network, precision, engine=engine, batch=batch, device=device), **where})
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # release the memory reserved for this network
    return pd.DataFrame(rows)


@cli.command("bench.measured_memory")
def main(arguments: Sequence[str] | None = None) -> int:
    """Write memory.csv, print the table and return 0."""
    parser = cli.parser_from("bench.measured_memory", __doc__, whole=True)
    add = parser.add_argument
    add_networks_option(parser)
    add("--batch", type=count, default=PUBLISHED.batch_size, metavar="N", help="images a step (%(default)s)")
    folders.add_place_options(parser, MEMORY_FILE)
    given = parser.parse_args(arguments)
    device, folder = folders.place_of(parser, given)
    table = measure(given.networks, batch=given.batch, device=device)
    folder.mkdir(parents=True, exist_ok=True)
    write_by_rename(folder / MEMORY_FILE, table.to_csv(index=False, lineterminator="\n").encode())
    mib = table.assign(**{f"{name} MiB": table[f"{name}_bytes"] / 2**20 for name in ("activation", "held", "peak")})
    columns = ["model", "precision", "engine", "activation MiB", "held MiB", "peak MiB"]
    print(mib[columns].to_markdown(index=False, floatfmt=".1f"), f"\nWritten {folder / MEMORY_FILE}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
