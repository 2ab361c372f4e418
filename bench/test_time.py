"""Seconds of a training step; this pass measures nothing else."""

import pytest
import torch

from bench import measure

failed: set = set()  # cases that are running or have failed


@pytest.mark.benchmark(group="time", timer=measure.clock)
def test_time(labelled, case, repeat: int, device: torch.device) -> None:
    if case in failed:
        labelled.pedantic(lambda: None)  # pytest-benchmark warns about a fixture that nobody uses
        pytest.skip("failed in its first repeat")
    failed.add(case)
    step, rounds, steps = measure.warmed_up(case, device)
    labelled.extra_info.update(repeat=repeat)
    labelled.pedantic(step, rounds=rounds, iterations=steps)
    failed.remove(case)
