"""Checkpoints, saved-tensor hooks and anomaly mode around blocks."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from memcnn.engine import retained
from memcnn.engine.chain import Value
from memcnn.engine.recompute import Activation
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.held import living
from properties.support.saving import WithDropout, cloning_hooks
from properties.support.twin import (
    Container,
    assert_like_twin,
    assert_same,
    block,
    conv_branch,
    images,
    plain_twin,
    run,
    weighted_sum,
)

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),  # torch's own use
]


def two_blocks(model, x):
    return model(model(x))


def blocks_and_others(model, x):
    return model(two_blocks(model, x).sin()).cos()


def program_of(inside, use_reentrant: bool | None):
    def program(model, x):
        x = x.cos()
        y = inside(model, x) if use_reentrant is None else checkpoint(inside, model, x, use_reentrant=use_reentrant)
        weighted_sum(y).backward()
        return y

    return program


@pytest.mark.parametrize("branch", [conv_branch, WithDropout], ids=["conv", "dropout"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inside", [two_blocks, blocks_and_others], ids=lambda inside: inside.__name__)
def test_checkpointed_blocks_train_as_the_checkpointed_twin(inside, use_reentrant, branch):
    model = block(branch)
    twin = plain_twin(model)
    program = program_of(inside, use_reentrant)
    actual, expected = run(model, program, [images()]), run(twin, program, [images()])
    if inside is two_blocks and not use_reentrant:
        # The checkpoint has no saved tensors to rebuild and runs no second forward pass. So BatchNorm is updated once,
        # and in the twin twice.
        expected.buffers = run(plain_twin(block_like(model)), program_of(inside, None), [images()]).buffers
    assert_same(actual, expected, limit=tolerance(torch.float64, depth=8))


def block_like(model: nn.Module) -> nn.Module:
    """Return a block with the model's parameters and new buffers."""
    fresh = plain_twin(model)
    for part in fresh.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    return fresh


def around(context):
    def program(model, x):
        with context():
            y = model(model(x.sin())).cos()
            weighted_sum(y).backward()
        return y

    return program


@pytest.mark.parametrize("branch", [conv_branch, WithDropout], ids=["conv", "dropout"])
@pytest.mark.parametrize("context", [save_on_cpu, cloning_hooks], ids=["save_on_cpu", "hooks"])
def test_blocks_under_hooks_train_as_the_twin(context, branch):
    assert_like_twin(block(branch), around(context), images())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_blocks_under_anomaly_mode_train_as_the_twin():
    assert_like_twin(block(WithDropout), around(torch.autograd.detect_anomaly), images())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomaly_mode_finds_a_nan_of_a_branch():
    class SquareRoot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt() * x

    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
        weighted_sum(block(SquareRoot)(images())).backward()


def node_named(name: str, y: Tensor) -> torch.autograd.graph.Node:
    """Return the first node of that name in the graph of y, searched from its end."""
    waiting = [y.grad_fn]
    while waiting:
        node = waiting.pop(0)
        if node.name() == name:
            return node
        waiting += [next_node for next_node, _ in node.next_functions if next_node is not None]
    raise LookupError(name)


def test_a_look_into_the_graph_shows_the_activations_and_keeps_none():
    """This holds for blocks that use hooks. On the direct way a run has only two nodes (``memcnn.engine.direct``)."""
    module = nn.Sequential(*(block(lambda: Container(*conv_branch())) for _ in range(2))).double()
    twin = plain_twin(module)
    x = images()
    y, wanted = module(x), twin(x)
    for name, saved in (("TanhBackward0", "_saved_result"), ("ConvolutionBackward0", "_saved_input")):
        for _ in range(2):
            seen = getattr(node_named(name, y), saved)
            expected = getattr(node_named(name, wanted), saved)
            assert relative_error(seen, expected) <= tolerance(x.dtype, depth=2)
    del seen
    assert not retained.passes
    assert sum(cell.tensor is not None for cell in living(Value)) == 2, "more than the halves of the end are stored"
    assert all(handle.tensor is None for handle in living(Activation))
    actual = torch.autograd.grad(weighted_sum(y), [x, *module.parameters()])
    expected = torch.autograd.grad(weighted_sum(wanted), [x, *twin.parameters()])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= tolerance(x.dtype, depth=4)
