"""Peak bytes of one forward and backward pass, by both meters. The seconds of this pass are the meters' own."""

import pytest
import torch

from bench.cases import Case
from memcnn.testing.memory import allocator_peak_bytes, measure_step_memory, tensor_peak_bytes


@pytest.mark.benchmark(group="memory")
def test_memory(labelled, case: Case, device: torch.device) -> None:
    model = case.model(device)
    step = case.step(model, device)
    step()  # what a library allocates once and keeps is not the step's

    def allocator(fn):
        return allocator_peak_bytes(fn, device=device)

    memory = labelled.pedantic(measure_step_memory, args=(model, step), kwargs={"meter": allocator}, rounds=1)
    tensors = measure_step_memory(model, step, meter=tensor_peak_bytes)
    labelled.extra_info.update(
        parameter_bytes=memory.parameter_bytes,
        peak_bytes=memory.peak_bytes,
        activation_bytes=memory.activation_bytes,
        tensor_activation_bytes=tensors.activation_bytes,
    )
    assert tensors.activation_bytes <= memory.activation_bytes
