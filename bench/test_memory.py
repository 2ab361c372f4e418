"""Peak bytes of a training step, and the evaluations of F and G in it. The seconds are those of the meters."""

import pytest
import torch

from bench import measure


@pytest.mark.benchmark(group="memory")
def test_memory(labelled, case, device: torch.device) -> None:
    memory = labelled.pedantic(measure.memory, args=(case, device), rounds=1)
    labelled.extra_info.update(memory, **measure.evaluations(case, device))
    assert memory["allocated_bytes"] is None or memory["peak_bytes"] <= memory["allocated_bytes"]
