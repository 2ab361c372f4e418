"""Peak memory as the allocator counts it: on the CPU from the profiler's events, on CUDA from its own counters."""

import gc
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

CUDA_BLOCK_BYTES = 512  # CUDA's caching allocator hands out whole blocks


def allocator_peak_bytes(fn: Callable[[], object], *, device: str | torch.device = "cpu") -> int:
    """Return the largest number of bytes that ``fn()`` holds from the allocator at one instant, scratch included.

    On the CPU these are the bytes requested inside ``fn``, exact to the byte; memory that was there at entry and is
    freed inside does not lower the count. On CUDA it is the rise of the allocator's high-water mark above the bytes
    allocated at entry, in the allocator's units of 512 bytes; the mark is reset. Calls cannot be nested.

    On CUDA, run ``fn`` once before: a thread's first matrix product takes a workspace of some megabytes, which cuBLAS
    keeps. ``measure_step_memory`` and ``measure_peak_split`` do so. Copies that an operator makes for itself count
    here, and ``tensor_peak_bytes`` does not see them: cuBLAS copies the gradient of ``y.sum()``, for instance.

    Args:
        fn: the code to measure.
        device: the device of the allocator: CPU or CUDA.

    Returns:
        The peak in bytes.

    Raises:
        RuntimeError: on the CPU, while a profiler is running.
        ValueError: for a device without such a meter.
    """
    device = _metered(device)
    if device.type == "cuda":
        return _cuda_rise_bytes(fn, device)
    return _peak_of(_cpu_allocations(fn))[0]


def allocator_total_bytes(
    fn: Callable[[], object], held: Callable[[], Iterable[Tensor]], *, device: str | torch.device = "cpu"
) -> int:
    """Return ``allocator_peak_bytes`` of ``fn`` plus the bytes of tensors that existed before it.

    On the CPU ``fn`` runs twice, because the profiler does not see the release of memory allocated before its start.

    Args:
        fn: the code to measure.
        held: returns tensors to include, which ``fn`` may free and replace, such as a model and its gradients.
        device: the device of the allocator: CPU or CUDA.

    Returns:
        The sum in bytes.

    Raises:
        RuntimeError: on the CPU, while a profiler is running.
        ValueError: for a device without such a meter.
    """
    device = _metered(device)
    if device.type == "cuda":
        held_bytes = sum(in_blocks(size, CUDA_BLOCK_BYTES) for size in _sizes(held()).values())
        return held_bytes + _cuda_rise_bytes(fn, device)
    peak_bytes, alive = _peak_of(_cpu_allocations(lambda: _twice(fn)))
    return peak_bytes + sum(size for address, size in _sizes(held()).items() if address not in alive)


def _metered(device: str | torch.device) -> torch.device:
    """Return the device. Raise a ValueError if its allocator has no meter."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"no allocator meter for device {device.type!r}, only for cpu and cuda; use tensor_peak_bytes, which works "
            "on any device"
        )
    return device


def _cuda_rise_bytes(fn: Callable[[], object], device: torch.device) -> int:
    """Return the rise of CUDA's high-water mark during ``fn`` above the bytes allocated at entry."""
    stream = torch.cuda.current_stream(device)  # wait for this stream alone: others may train other models
    gc.collect()  # garbage in reference cycles, freed inside ``fn``, would lower the rise
    stream.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    stream.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def in_blocks(size: int, block_bytes: int) -> int:
    """Return ``size`` rounded up to whole blocks, in bytes."""
    return -(-size // block_bytes) * block_bytes


def _twice(fn: Callable[[], object]) -> None:
    fn()
    fn()


def _sizes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the distinct storages behind ``tensors``, by their addresses."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout is torch.strided]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}


def _cpu_allocations(fn: Callable[[], object]) -> list[tuple[int, int]]:
    """Return (address, bytes) of every CPU allocation of ``fn()`` in its order; bytes are negative for a release."""
    if torch.autograd._profiler_enabled():
        raise RuntimeError(
            "allocator_peak_bytes: a profiler is already running and there can be only one; use tensor_peak_bytes in it"
        )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_bytes())["traceEvents"] if event["name"] == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in events if event["args"]["Device Type"] == 0]


def _peak_of(allocations: Iterable[tuple[int, int]]) -> tuple[int, dict[int, int]]:
    """Return the peak in bytes, and the remaining allocations, address to bytes. Ignore releases of older memory."""
    alive: dict[int, int] = {}
    current_bytes = peak_bytes = 0
    for address, size in allocations:
        if size > 0:
            alive[address] = size
            current_bytes += size
            peak_bytes = max(peak_bytes, current_bytes)
        else:
            current_bytes -= alive.pop(address, 0)
    return peak_bytes, alive
