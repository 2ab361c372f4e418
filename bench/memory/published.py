"""The page on the memory of the six networks: published, recomputed on fake tensors, and measured on GPUs."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from memcnn.memory import CUDA_BLOCK_BYTES, TensorMeter, measure_step_memory, predict_step_memory
from memcnn.memory.allocator_2018 import Meter2018
from memcnn.models.resnet import MODELS
from memcnn.training.record import load_all
from reports import RECORDS, cells
from reports.tables import GPU_PRECISIONS, MEASUREMENTS, MIB, gpu_measurements, memory_table, published, runs_table

BATCH = 100
COMMAND = "python -m bench.memory --table --out reports/activations.md"


def render(*, progress: Callable[[str], None] = lambda text: None, batch: int = BATCH) -> str:
    """Return the tables and their notes as Markdown."""
    rows = []
    for name in MODELS:
        progress(f"predicting {name}")
        rows.append(row(name, batch))
    table = pd.DataFrame(rows).set_index("model")
    values = published().dropna(subset="activations_mib").set_index("model")
    return PAGE.format(
        command=COMMAND,
        torch=torch.__version__,
        batch=batch,
        beside=_markdown(beside_published(table, values)),
        saved=_markdown(saved(table)),
        on_gpu=on_gpu(values, MEASUREMENTS, RECORDS),
        stem=f"{(table.held_2018 - table.held_2018_without_relu).max() / MIB:.1f}",
    )


def row(name: str, batch: int) -> dict:
    """Return all numbers of one network, in bytes; ``twin`` stands for the network with the engine off."""
    reversible, twin = MODELS[name], lambda: MODELS[name](disable=True)
    held = held_after_forward(reversible, batch)
    has_engine = name.startswith("revnet")
    return {
        "model": name,
        "model_blocks": model_blocks(reversible),
        "held": held["tensors"],
        "held_blocks": held["blocks"],
        "held_2018": held["blocks of 2018"],
        "held_2018_without_relu": held_after_forward(lambda: without_stem_relu(reversible()), batch)["blocks of 2018"],
        "peak": peak_activations(reversible, batch),
        "step": whole_step(reversible, batch),
        "twin_held": held_after_forward(twin, batch)["tensors"] if has_engine else None,
        "twin_peak": peak_activations(twin, batch) if has_engine else None,
        "twin_step": whole_step(twin, batch) if has_engine else None,
    }


def make_batch(batch: int) -> tuple[Tensor, Tensor]:
    """Return images of shape (N, 3, 32, 32) and labels of shape (N,)."""
    return torch.empty(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)


def held_after_forward(make_model: Callable[[], nn.Module], batch: int) -> dict[str, int]:
    """Count the bytes held after the forward pass, without the model, by three rules.

    They are batch, outputs, loss and the tensors saved for backward.

    Returns:
        Bytes as "tensors", as "blocks" of today's allocator, and as "blocks of 2018".
    """
    with FakeTensorMode():
        model = make_model()
        with TensorMeter() as tensors, TensorMeter(block_bytes=CUDA_BLOCK_BYTES) as blocks, Meter2018() as old:
            images, labels = make_batch(batch)
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels)
            held = {
                "tensors": tensors.current_bytes,
                "blocks": blocks.current_bytes,
                "blocks of 2018": old.allocated_bytes,
            }
            del loss  # it keeps the graph alive until here
            return held


def peak_activations(make_model: Callable[[], nn.Module], batch: int) -> int:
    """Return the peak bytes of a step, without model, gradients and batch."""
    with FakeTensorMode():
        model, (images, labels) = make_model(), make_batch(batch)
        return measure_step_memory(model, lambda: F.cross_entropy(model(images), labels).backward()).activation_bytes


def whole_step(make_model: Callable[[], nn.Module], batch: int) -> int:
    """Return the peak bytes of a training step, everything included, in the allocator's blocks."""
    return predict_step_memory(make_model, lambda: make_batch(batch), device="cuda").peak_bytes


def model_blocks(make_model: Callable[[], nn.Module]) -> int:
    """Return the bytes of parameters and buffers in the allocator's blocks."""
    with FakeTensorMode(), TensorMeter(block_bytes=CUDA_BLOCK_BYTES) as meter:
        model = make_model()
        held = meter.current_bytes
        del model
        return held


def without_stem_relu(model: nn.Module) -> nn.Module:
    """Replace the network's first ReLU by a module that saves nothing for backward, and return the network."""
    model.stem[2] = nn.Identity()
    return model


def beside_published(table: pd.DataFrame, values: pd.DataFrame) -> pd.DataFrame:
    """Return published and recomputed numbers side by side, in MiB."""
    columns = {
        ("parameters", "published"): values.parameters_mib,
        ("parameters", "here"): table.model_blocks / MIB,
        ("activations", "published"): values.activations_mib,
        ("activations", "here"): table.held / MIB,
        ("activations", "as counted in 2018"): table.held_2018 / MIB,
        ("activations", "and less the stem's ReLU"): table.held_2018_without_relu / MIB,
        ("activations", "still differs by"): table.held_2018_without_relu / MIB - values.activations_mib,
    }
    return pd.DataFrame({f"{group}: {name}": column.reindex(table.index) for (group, name), column in columns.items()})


def saved(table: pd.DataFrame) -> pd.DataFrame:
    """Return the memory with reversible units beside that of their twins with stored activations, in MiB."""
    columns = {"held after forward": "held", "peak of step": "peak", "whole step on CUDA": "step"}
    pairs = {}
    for text, name in columns.items():
        twin = table[f"twin_{name}"].astype(float).fillna(table[name])
        pairs[f"{text}: stored"] = twin / MIB
        pairs[f"{text}: reversible"] = (table[name] / MIB).where(table.index.str.startswith("revnet"))
    pairs["saved of the whole step"] = 100 * (1 - table.step / table.twin_step.astype(float))
    return pd.DataFrame(pairs)


def on_gpu(values: pd.DataFrame, measurements: Path, records: Path) -> str:
    """Return published activations beside those measured on GPUs, as Markdown; a dash stands for no measurement.

    Args:
        values: the published numbers, one row for each network.
        measurements: holds a folder for each device, see ``bench.measured_memory``.
        records: folder of the committed runs, whose records hold the peak of a step.
    """
    measured, _ = gpu_measurements(measurements)
    peaks = cells.memory(memory_table(runs_table(load_all(records)[0]), measured))[cells.ON_GPU]
    table = {"": list(MODELS), "published, held": [f"{values.activations_mib[name]:,.1f}" for name in MODELS]}
    for precision in GPU_PRECISIONS:
        held = measured[measured["precision"] == precision].groupby("model")["held_bytes"]
        ends = zip(held.min().reindex(list(MODELS)) / MIB, held.max().reindex(list(MODELS)) / MIB, strict=True)
        table[f"{precision}: held"] = [cells.spread(cells.number(low, 1), cells.number(high, 1)) for low, high in ends]
        table[f"{precision}: peak"] = list(peaks[precision])
    table["device"] = list(peaks["device"])
    columns = ("left", *["right"] * (len(table) - 2), "left")
    return pd.DataFrame(table).to_markdown(index=False, colalign=columns, disable_numparse=True)


def _markdown(table: pd.DataFrame) -> str:
    """Return numbers in MiB with one decimal as a Markdown table."""
    cells = table.map(lambda value: "–" if pd.isna(value) else f"{round(value, 1) + 0:,.1f}")  # + 0: no -0.0
    if "saved of the whole step" in cells:
        cells["saved of the whole step"] = [c if c == "–" else f"{c} %" for c in cells["saved of the whole step"]]
    return (
        cells.rename_axis("")
        .reset_index()
        .to_markdown(index=False, colalign=("left", *["right"] * len(cells.columns)), disable_numparse=True)
    )


PAGE = """# Memory of the six networks: published and recomputed

    {command}

writes this page on any machine. The networks run on fake tensors, which have shapes and lifetimes but no data, so the
numbers are exact (torch {torch}) and the same everywhere. Batch {batch}, float32, ten classes, MiB.

## Beside the published table

{beside}

Why they differ:

* **Unit.** The published table is labelled MB, but its numbers are MiB. *Parameters* are parameters and BatchNorm's
  buffers in the allocator's 512-byte blocks.
* **Counted tensors.** *Activations* are the bytes allocated after the forward pass of the *first* iteration, without
  the model: batch, output, loss and the tensors saved for backward. From the second iteration on, gradients and
  momentum would add twice the parameters. *Here* sums the tensors at the same instant.
* **The allocator of 2018** rounded requests above 1 MiB up to units of 128 KiB. A map of 100 x 64 x 8 x 8 float32
  numbers takes 12.5 units and was counted as 13. The batch takes 9.4 units and was counted as 10. *As counted in 2018*
  applies the rules of that allocator to the tensors of this forward pass (memcnn/memory/allocator_2018.py).
* **The stem's ReLU** ({stem} MiB, RevNet-38 and -110). ReLU saves its output for its own backward, and this output is
  the input of the first reversible unit. MemCNN 1.5 emptied the storage of a block's input. This emptied the saved
  output as well, so the output was not counted. For the same reason MemCNN 1.5 cannot train these two networks on
  current PyTorch. This project never empties a tensor that other code has saved. In RevNet-164 the first unit is not
  reversible, and both keep that map.
* **The remaining difference** is below 0.1, except for RevNet-38. Its last stage has 112 channels, and its maps do not
  exactly fit a block freed by another stage. The allocator of 2018 gave out such blocks whole, so the count depends on
  the order in which blocks were freed, cuDNN's workspaces included. The forward pass of MemCNN 1.5.2 itself, on a CPU
  and by the same rules, gives 85.3 (and for the other networks the published numbers to 0.1).

## What reversibility saves

{saved}

*Held after forward* is the published quantity. *Peak of step* is the highest total during forward and backward, without
model, gradients and batch. In a RevNet it lies in the backward pass, which recomputes the activations of one branch at
a time; the published number leaves it out. *Whole step on CUDA* is the total with parameters, gradients, momentum and
batch, in 512-byte blocks; `python -m bench.memory --help` lists the bytes that no prediction counts. *Stored* is the
same network under ordinary autograd (`disable=True`).

## Measured on a GPU

{on_gpu}

MiB at batch 100 with the engine on, as counted by CUDA's allocator, with the kernels' workspaces. *Held*: the bytes
after the forward pass, without the model but with the batch, like the published number. They come from
reports/bench/*/memory.csv, which `python -m bench.measured_memory` writes. *Peak*: the highest total during forward and
backward, without model, gradients and batch. It comes from the same files and from the records of runs on a GPU. In
bf16 weights, residual stream and BatchNorm statistics stay float32. A dash is a number that nobody measured.
"""
