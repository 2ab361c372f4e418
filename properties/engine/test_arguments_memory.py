"""Memory held for several arguments and outputs: no cycles, and no more in a deeper chain."""

import gc

import pytest
import torch

from memcnn import InvertibleModuleWrapper
from memcnn.memory import TensorMeter
from properties.engine.test_arguments import (
    Conditioned,
    ListOfStreams,
    PassesOneOn,
    TwoStreams,
    WithLengths,
    differentiated,
    rows,
    wrapped,
)
from properties.support.twin import weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def test_arguments_that_are_kept_are_no_cycle():
    gc.collect()
    gc.disable()
    try:
        with TensorMeter() as meter:
            module = wrapped(Conditioned())
            parameters = meter.current_bytes
            condition, x = rows(1), rows(0)
            y = module(module(x, condition=condition.sin()), condition=condition.cos())
            weighted_sum(y).backward()
            del y, x, condition
            module.zero_grad()
            assert meter.current_bytes == parameters
    finally:
        gc.enable()


class WithMoreBeside(PassesOneOn):
    """Returns a dictionary of further tensors beside its streams."""

    def forward(self, x1, x2):
        y1, y2 = super().forward(x1, x2)
        return y1, y2, {"norm": y1.norm()}

    def inverse(self, y1, y2, _):
        return super().inverse(y1, y2)


@pytest.mark.parametrize("make", [ListOfStreams, WithLengths, WithMoreBeside], ids=lambda make: make.__name__)
@pytest.mark.parametrize("trained", [True, False], ids=["differentiated", "dropped"])
def test_outputs_are_no_cycle(make, trained):
    gc.collect()
    gc.disable()
    try:
        with TensorMeter() as meter:
            module = wrapped(make())
            parameters = meter.current_bytes
            outputs = module(rows(0), rows(1))
            if trained:
                differentiated(*outputs)
            del outputs
            module.zero_grad()
            assert meter.current_bytes == parameters
    finally:
        gc.enable()


def several_streams(depth: int, disable: bool) -> int:
    """Return the peak bytes of a step through wrapped modules with two streams."""
    chain = [InvertibleModuleWrapper(TwoStreams(), disable=disable) for _ in range(depth)]
    x1, x2 = (torch.ones(2048, 3, requires_grad=True) for _ in range(2))
    for p in [x1, x2, *(p for module in chain for p in module.parameters())]:
        p.grad = torch.zeros_like(p)
    with TensorMeter() as meter:
        inputs = x1, x2
        for module in chain:
            inputs = module(*inputs)
        sum(y.sum() for y in inputs).backward()
    return meter.peak_bytes


def test_chains_of_several_streams_are_flat_in_memory():
    stored = (several_streams(6, True) - several_streams(2, True)) / 4
    assert (several_streams(24, False) - several_streams(4, False)) / 20 < stored / 100
