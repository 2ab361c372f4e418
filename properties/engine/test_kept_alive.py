"""Which tensors the engine keeps alive between passes, and that it keeps none afterwards."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from torch import nn

from memcnn import AdditiveCoupling, AffineAdapterNaive, AffineCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine.chain import Value
from memcnn.testing.cases import Network
from memcnn.testing.strategies import networks
from properties.support.held import held_bytes, living
from properties.support.twin import block, images, weighted_sum


@given(networks(max_depth=2))
def test_without_gradients_a_forward_pass_leaves_nothing_behind(network: Network):
    module, x = network.build(), network.input.build()
    with torch.no_grad():
        plain = module(x)
    assert plain.grad_fn is None and not plain.requires_grad
    with torch.inference_mode():
        assert not module(x).requires_grad
    assert not living()


def test_batch_norm_moves_once_a_step():
    module = block()
    for step in range(1, 4):
        weighted_sum(module(images(seed=step))).backward()
        counts = {name: b.item() for name, b in module.named_buffers() if name.endswith("num_batches_tracked")}
        assert counts and set(counts.values()) == {step}


def test_memory_is_freed_by_reference_counting_alone():
    gc.collect()
    gc.disable()
    try:
        module = ReversibleSequential(*(block()._fn for _ in range(3)))
        y = module(images())
        assert living()
        loss = weighted_sum(y)
        loss.backward(retain_graph=True)
        loss.backward()
        output = weakref.ref(y)
        del y, loss
        assert output() is None
        assert not living()

        y = module(images())  # a graph that is deleted without a backward pass
        del y
        assert not living()
    finally:
        gc.enable()


def test_a_retained_graph_holds_no_more_after_a_pass_than_before_it():
    module = ReversibleSequential(*(block()._fn for _ in range(3)))
    loss = weighted_sum(module(images()))
    before = held_bytes()
    loss.backward(retain_graph=True)
    assert held_bytes() == before > 0
    assert all(value.pending_reads == 0 for value in living(Value))


@pytest.mark.parametrize("switch", ["disable", "enable"])
def test_the_engine_is_switched_at_run_time(switch):
    module = block(disable=switch == "enable")
    outputs = [module(images())]
    assert bool(living()) == (switch == "disable")
    outputs.clear()
    module.disable = switch == "disable"
    outputs.append(module(images()))
    assert bool(living()) == (switch == "enable")


def test_without_gradients_the_engine_keeps_no_objects():
    module = InvertibleModuleWrapper(AdditiveCoupling(nn.Conv2d(3, 3, 1))).double().requires_grad_(False)
    y = module(images(requires_grad=False))
    assert not y.requires_grad and not living()


def test_running_statistics_are_not_copied_for_backward():
    channels = 211
    module = block(lambda: nn.Sequential(nn.BatchNorm1d(channels), nn.Dropout(0.5)))

    def vectors() -> set[int]:
        return {id(x) for x in living(torch.Tensor, nn.Parameter) if x.shape == (channels,)}

    before = vectors()
    y = module(images(4, 2 * channels))
    assert vectors() == before
    assert y.grad_fn is not None


def test_a_graph_of_the_recomputation_that_a_module_keeps_holds_no_half_that_is_no_part_of_it():
    """For example a penalty that forward collects."""
    collected = []

    class Collecting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = super().forward(x)
            collected.append(h)
            return h

    module = InvertibleModuleWrapper(AffineCoupling(Collecting(3, 3), Collecting(3, 3), AffineAdapterNaive)).double()
    weighted_sum(module(images(1021, 6, requires_grad=False))).backward()
    of_the_recomputation = collected[2:]
    collected.clear()
    assert len(of_the_recomputation) == 2
    halves = [x for x in living(torch.Tensor) if x.shape == (1021, 3)]
    assert len(halves) == 3, "the two results, and the leaf that the gradient of G's input goes to"
