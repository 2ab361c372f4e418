"""Parameters of a block: frozen, unused and shared ones, and parameters that the first batch sets."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from properties.engine.test_arguments import DEPTH, net
from properties.support.blocks import refused
from properties.support.twin import (
    assert_like_twin,
    backward,
    block,
    conv_branch,
    images,
    weighted_sum,
)

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "chain",
    [
        lambda: nn.Sequential(*(block(net) for _ in range(DEPTH))),
        lambda: ReversibleSequential(*(AdditiveCoupling(net(), net()) for _ in range(DEPTH))).double(),
    ],
    ids=["wrapped blocks", "sequence"],
)
@pytest.mark.parametrize("frozen", ["Fm", "Gm", "0._fn.Fm.0.weight", "0.", "1.", "2."])
def test_frozen_parameters_get_no_gradient_and_the_others_keep_theirs(chain, frozen, requires_grad):
    model = chain()
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name and not name.startswith(frozen))
    outcome = assert_like_twin(model, backward, images(4, 6, requires_grad=requires_grad))
    assert any(g is None for g in outcome.gradients.values())


def test_a_frozen_block_hands_the_gradient_to_its_input():
    assert_like_twin(block(net).requires_grad_(False), backward, images(4, 6))


@pytest.mark.parametrize(("then", "before_backward"), [(True, False), (False, True)], ids=["frozen", "unfrozen"])
@pytest.mark.parametrize(("branch", "shape"), [(net, (4, 6)), (conv_branch, (2, 6, 5, 4))], ids=["linear", "conv"])
def test_parameters_frozen_or_unfrozen_before_backward_are_those_of_the_forward_pass(
    branch, shape, then, before_backward
):
    """Parameters whose ``requires_grad`` is switched off and on again, as in adversarial training."""

    def program(module, x):
        module.requires_grad_(then)
        loss = weighted_sum(module(module(x)))
        module.requires_grad_(before_backward)
        loss.backward()
        assert all(p.requires_grad == before_backward for p in module.parameters())

    assert_like_twin(block(branch), program, images(*shape))


class UsesHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = net(), net()

    def forward(self, x):
        return self.used(x)


def test_unused_parameters_get_no_gradient():
    outcome = assert_like_twin(nn.Sequential(block(UsesHalf), block(UsesHalf)), backward, images(4, 6))
    assert any(g is None for g in outcome.gradients.values())


class Shared(nn.Module):
    """Uses one module as F of a block, as G of another block, and between the two."""

    def __init__(self):
        super().__init__()
        shared = net()
        self.first = InvertibleModuleWrapper(AdditiveCoupling(shared, net()))
        self.second = InvertibleModuleWrapper(AdditiveCoupling(net(), shared))
        self.shared = shared

    def forward(self, x):
        return self.second(self.first(x) * self.shared(x[:, :3]).repeat(1, 2))


def same_branch_twice() -> nn.Module:
    branch = net()
    return nn.Sequential(*(InvertibleModuleWrapper(AdditiveCoupling(branch, branch)) for _ in range(2)))


def same_block_twice() -> nn.Module:
    repeated = block(net)
    return nn.Sequential(repeated, block(net), repeated)


def same_coupling_twice_in_a_sequence() -> nn.Module:
    coupling = AdditiveCoupling(net(), net())
    return ReversibleSequential(coupling, AdditiveCoupling(net(), net()), coupling)


@pytest.mark.parametrize(
    "make",
    [Shared, same_branch_twice, same_block_twice, same_coupling_twice_in_a_sequence],
    ids=lambda make: make.__name__,
)
def test_shared_modules_gather_their_gradients(make):
    assert_like_twin(make().double(), backward, images(4, 6))


def test_batch_norm_shared_between_blocks_moves_once_for_each_use():
    branch = conv_branch()
    model = nn.Sequential(*(InvertibleModuleWrapper(AdditiveCoupling(branch, branch)) for _ in range(2))).double()
    assert_like_twin(model, backward, images())
    assert branch[1].num_batches_tracked == 4


class SetsItself(nn.Module):
    """Divides by the deviation of its first batch, and notes in a buffer that it has taken it.

    recorded: autograd takes part in that, though nobody asks for the gradient.
    """

    def __init__(self, note: Callable[[nn.Module], None], recorded: bool = False):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(6))
        self.register_buffer("ready", torch.tensor(False))
        self.note, self.recorded = note, recorded

    def forward(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.log_scale.data = -(x if self.recorded else x.detach()).std(0).log().data
            self.note(self)
        return x * self.log_scale.exp()

    def inverse(self, y: Tensor) -> Tensor:
        return y / self.log_scale.exp()


def filled(layer: SetsItself) -> None:
    layer.ready.fill_(True)


def given_other_data(layer: SetsItself) -> None:
    layer.ready.data = torch.tensor(True)


def exchanged(layer: SetsItself) -> None:
    layer.ready = torch.tensor(True)


@pytest.mark.parametrize("note", [filled, given_other_data, exchanged])
@pytest.mark.parametrize(
    ("make", "features"),
    [
        (InvertibleModuleWrapper, 6),
        (lambda layer: ReversibleSequential(layer, copy.deepcopy(layer)), 6),
        (lambda layer: block(lambda: nn.Sequential(nn.Linear(6, 6), copy.deepcopy(layer), nn.Tanh())), 12),
    ],
    ids=["a block", "blocks", "in branches"],
)
def test_a_layer_that_initialises_itself_and_says_so_in_a_buffer_does_so_once(make, features, note):
    def two_steps(module, x):
        first = backward(module, x)
        return first, backward(module, x.detach() + 1)

    module = make(SetsItself(note)).double()
    assert_like_twin(module, two_steps, images(5, features))
    assert all(part.ready for part in module.modules() if isinstance(part, SetsItself))


def test_on_a_gpu_the_recomputation_begins_with_the_buffer_that_the_first_pass_set(monkeypatch):
    """A stand-in for a GPU, where small buffers are copied for backward instead of summed up."""
    monkeypatch.setattr(Tensor, "is_cpu", False)
    assert_like_twin(InvertibleModuleWrapper(SetsItself(filled)).double(), backward, images(5, 6))


def test_a_layer_whose_initialisation_is_recorded_is_refused_until_it_has_seen_a_batch():
    layer = SetsItself(filled, recorded=True).double()
    unready = InvertibleModuleWrapper(copy.deepcopy(layer))
    with refused(RuntimeError, "SetsItself computed something else", "give it one before it is wrapped"):
        backward(unready, images(5, 6))
    layer(images(5, 6))
    assert_like_twin(InvertibleModuleWrapper(layer), backward, images(5, 6))
