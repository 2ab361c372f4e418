"""The modes of a case's step besides eager float32: precision, memory format, compiler, CUDA graphs."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from bench.cases import THREE, Chain, Step, branches

MODES = {
    "eager": "float32",
    "bf16": "F and G in bfloat16 under autocast, the residual stream in float32",
    "channels_last": "float32, channels innermost",
    "compile-branches": "F and G compiled by torch.compile, one by one",
    "compile-model": "the whole module compiled; around a reversible block the graph breaks",
    "graph": "the whole step captured in a CUDA graph and replayed",
}


def modes(*, quick: bool, cuda: bool) -> list[Chain]:
    """Return chains in all modes: with long kernels, and with kernels so short that launching them takes most time."""
    large, small = (8, 64, 64, 32) if cuda else (2, 4, 64, 32), (16 if cuda else 4, 2, 4, 4)
    # Graphs come last: after a failed capture, the process may be unable to run other cases.
    return [Chain("mode", subject, *sizes, mode) for mode in MODES for sizes in (large, small) for subject in THREE]


def why_not(case, *, cuda: bool, everywhere: bool) -> str | None:
    """Return why the case cannot run here and what it needs; None if it can."""
    if case.mode == "graph" and not cuda:
        return "CUDA graphs need a GPU: run on a machine that has one"
    if case.series == "mode" and not cuda and not everywhere:
        return "a comparison for GPUs: add --modes to run it on the CPU, too"
    if case.mode.startswith("compile") and not cuda and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler: install g++"
    return None


def prepared(case, device: torch.device) -> tuple[nn.Module, Step]:
    """Return the case's model, and its training step in the case's mode."""
    model = case.model(device)
    autocast = nullcontext
    if case.mode == "bf16":
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
    elif case.mode == "channels_last":
        model.to(memory_format=torch.channels_last)
    elif case.mode == "compile-branches":
        for branch in branches(model):
            branch.compile()
    elif case.mode == "compile-model":
        model.compile()
    step = case.step(model, device, autocast)
    return model, captured(model, step) if case.mode == "graph" else step


def captured(model: nn.Module, step: Step) -> Step:
    """Capture the step in a CUDA graph, and return its replay, which writes new gradients into the graph's memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch.cuda.graph requires a warm-up on a stream that is not the default
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # the warm-up's stream: autograd has bound the leaves to it
        step.run()

    def replay() -> None:
        graph.replay()

    replay.keeps_alive = step.run  # keeps the tensors alive that the graph reads and writes
    return replace(step, run=replay)
