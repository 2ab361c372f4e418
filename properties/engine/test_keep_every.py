"""``keep_every`` chooses between storing all activations, recomputing all of them, and steps in between."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memcnn import AdditiveCoupling, ReversibleSequential
from memcnn.memory import TensorMeter
from properties.support.twin import assert_like_twin, backward, block, conv_branch, images, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")

DIAL = (1, 2, 4, None)


def chain(depth: int = 8, **options) -> ReversibleSequential:
    return ReversibleSequential(*(block()._fn for _ in range(depth)), **options)


@pytest.mark.parametrize("keep_every", [1, 2, 3, 8, 100, None])
def test_every_setting_computes_the_same(keep_every):
    assert_like_twin(chain(keep_every=keep_every), backward, images(), depth=16)

    def inverse(module, y):
        weighted_sum(module.inverse(y)).backward()

    assert_like_twin(chain(4, keep_every=keep_every), inverse, images(), depth=16)


def test_memory_falls_and_work_rises_from_setting_to_setting():
    memory, flops = [], []
    for keep_every in DIAL:
        module = ReversibleSequential(*(AdditiveCoupling(conv_branch(8)) for _ in range(8)), keep_every=keep_every)
        x = torch.zeros(2, 16, 16, 16, requires_grad=True)
        for tensor in (x, *module.parameters()):
            tensor.grad = torch.zeros_like(tensor)
        with TensorMeter() as meter, FlopCounterMode(display=False) as counter:
            weighted_sum(module(x)).backward()
        memory.append(meter.peak_bytes)
        flops.append(counter.get_total_flops())
    assert memory == sorted(memory, reverse=True) and memory[0] > 2 * memory[-1]
    one_pass = flops[0] / 3
    assert flops == [one_pass * (3 + share) for share in (0, 1 / 2, 3 / 4, 1)]


@pytest.mark.parametrize("keep_every", DIAL)
def test_stored_blocks_are_not_evaluated_again(keep_every):
    module = chain(keep_every=keep_every)
    calls = Counter()
    for i, part in enumerate(module):
        forward = part._fn.Fm.forward
        part._fn.Fm.forward = lambda x, forward=forward, i=i: (calls.update([i]), forward(x))[1]
    weighted_sum(module(images())).backward()
    stored = {i for i in range(8) if keep_every and (7 - i) % keep_every == 0}
    assert calls == {i: 1 if i in stored else 2 for i in range(8)}


@pytest.mark.parametrize("direction", ["forward", "inverse", "forward_log_det", "inverse_log_det"])
def test_a_chain_stores_its_end_in_both_directions(direction):
    module = chain(3, keep_every=3)
    calls = Counter()
    for i, part in enumerate(module):
        part._fn.Fm[0].forward = lambda x, i=i, forward=part._fn.Fm[0].forward: (calls.update([i]), forward(x))[1]
    result = getattr(module, direction)(images())
    weighted_sum(result[0] if isinstance(result, tuple) else result).backward()
    end = 0 if direction.startswith("inverse") else 2
    assert calls == {i: 1 if i == end else 2 for i in range(3)}


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_other_values_are_refused(wrong):
    with pytest.raises(ValueError, match="keep_every must be None or a whole number"):
        ReversibleSequential(block(), keep_every=wrong)
