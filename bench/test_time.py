"""Seconds of one forward and backward pass. Nothing else is measured in this pass."""

import pytest
import torch

from bench.cases import Case, clock

ROUNDS = 3


@pytest.mark.benchmark(group="time", timer=clock)
def test_time(labelled, case: Case, device: torch.device) -> None:
    step = case.step(case.model(device), device)
    labelled.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
