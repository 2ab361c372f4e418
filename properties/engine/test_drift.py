"""A warning in sampled steps reports rebuilt activations that differ from those of the forward pass."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.engine import drift
from memcnn.testing.tolerances import relative_error
from properties.engine.test_overhead import Operators
from properties.support.blocks import Notes, refused
from properties.support.twin import block, conv_branch, images, plain_twin, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")

STEPS = 4
"""Number of steps; the drift watch samples the last of them, and none before."""


def pre_activated(channels: int = 8) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1, bias=False))


def padded(seed: int, *, dead: bool = True) -> Tensor:
    """Return images with 16 channels; 13 of them are 0."""
    x = images(4, 16, 8, 8, dtype=torch.float32, seed=seed, requires_grad=False)
    if dead:
        x[:, 3:] = 0
    return x


def read_all() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    drift.read_arrived()


def trained(module: nn.Module, make, steps: int = STEPS) -> list[str]:
    """Train some steps, and return the warnings; on a GPU, wait for the measurements."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            module.zero_grad()
            weighted_sum(module(make(step))).backward()
        read_all()
    return [str(warning.message) for warning in caught]


def sequence(**options) -> nn.Module:
    torch.manual_seed(0)
    return ReversibleSequential(*(AdditiveCoupling(pre_activated(), pre_activated()) for _ in range(3)), **options)


def test_channels_that_are_constantly_zero_are_warned_of_once():
    module = sequence()
    twin = plain_twin(module)
    found = trained(module, padded, steps=16)
    assert len(found) == 1
    for word in (
        "Sequential(BatchNorm2d, ReLU, Conv2d)",
        "% positive entries instead of",
        "exact=True",
        "keep_every",
        "keep_input=True",
    ):
        assert word in found[0]
    trained(twin, padded, steps=16)
    errors = [relative_error(p.grad, q.grad) for p, q in zip(module.parameters(), twin.parameters(), strict=True)]
    assert max(errors) > 0.01, "the gradients are wrong, so that the warning is due"


def test_a_second_model_of_the_same_kind_gets_a_warning_of_its_own():
    assert [len(trained(sequence(), padded)) for _ in range(2)] == [1, 1]


def sequence_of_instance_norms() -> nn.Module:
    """Return blocks whose running means are saved for backward and change with every step."""
    return ReversibleSequential(
        *(
            AdditiveCoupling(nn.Sequential(nn.InstanceNorm2d(8, track_running_stats=True), nn.Conv2d(8, 8, 1)))
            for _ in range(3)
        )
    )


def kept_inputs() -> nn.Module:
    return nn.Sequential(*(InvertibleModuleWrapper(block._fn, keep_input=True) for block in sequence()))


@pytest.mark.parametrize(
    "make",
    [lambda: sequence(exact=True), lambda: sequence(keep_every=1), kept_inputs],
    ids=["exact", "keep_every", "keep_input"],
)
def test_the_remedies_that_the_warning_names_are_some(make):
    module = make()
    twin = plain_twin(module)
    assert not trained(module, padded)
    trained(twin, padded)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert relative_error(p.grad, q.grad) < 1e-3


@pytest.mark.parametrize(
    "make",
    [
        sequence,
        sequence_of_instance_norms,
        lambda: nn.Sequential(*(block(conv_branch) for _ in range(8))).float(),
        lambda: block(lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(), nn.ReLU())),
        lambda: block(lambda: nn.Sequential(nn.Linear(8, 8), nn.RReLU(), nn.Linear(8, 8))),
    ],
    ids=["batch norm", "instance norm", "float32", "dropout", "noise that is drawn after it is saved"],
)
def test_healthy_networks_are_not_warned_of(make):
    module = make()
    shape = {ReversibleSequential: (4, 16, 8, 8), nn.Sequential: (4, 6, 8, 8)}.get(type(module), (64, 16))
    dtype = next(module.parameters()).dtype
    assert not trained(module, lambda seed: images(*shape, dtype=dtype, seed=seed), steps=16)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_values_that_cannot_be_rebuilt_are_warned_of(value):
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[:1] * value, x[1:]])

    def branch() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

    module = ReversibleSequential(AdditiveCoupling(branch(), branch()), AdditiveCoupling(branch(), Masked()))
    found = trained(module, lambda seed: images(4, 16, dtype=torch.float32, seed=seed))
    assert found and "a norm of nan instead of" in found[0]


def test_zeros_that_nothing_amplifies_are_not_warned_of():
    def branch() -> nn.Module:
        return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 1, bias=False))

    module = ReversibleSequential(*(AdditiveCoupling(branch(), branch()) for _ in range(3)))
    assert not trained(module, lambda seed: padded(seed) * 0)


class Configured(nn.Module):
    """Reads a number from an object, which the engine does not restore."""

    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.linear, self.config = nn.Linear(8, 8), config

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.config.temperature).tanh()


def test_unseen_state_that_changes_between_forward_and_backward_is_warned_of():
    config = SimpleNamespace(temperature=1.0)
    module = InvertibleModuleWrapper(AdditiveCoupling(Configured(config), nn.Identity()))

    def make(step: int) -> Tensor:
        config.temperature = 1.0
        y = images(64, 16, dtype=torch.float32, seed=step).sin()
        y.register_hook(lambda gradient: None)
        return y

    def changing(module: nn.Module):
        def run(x: Tensor) -> Tensor:
            y = module(x)
            config.temperature = 0.5
            return y

        return run

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            weighted_sum(changing(module)(make(step))).backward()
        read_all()
    assert len(caught) == 1 and "Configured(Linear)" in str(caught[0].message) and "a norm of" in str(caught[0].message)


def test_the_watch_costs_operators_in_sampled_steps_alone():
    module, counts = sequence(), []
    for step in range(20):
        with Operators() as operators, FlopCounterMode(display=False):
            weighted_sum(module(padded(step, dead=False))).backward()
        counts.append(operators.counts["linalg_vector_norm"])
    assert [step + 1 for step, count in enumerate(counts) if count] == [4, 16]


def test_on_a_gpu_the_numbers_are_read_when_they_have_arrived(monkeypatch):
    """A stand-in for an event: the comparison waits for it and for nothing else."""
    arrived = SimpleNamespace(query=lambda: ready)
    watch = drift.Drift(nn.Linear(2, 2))
    what = drift.Comparison([0], [torch.Size([100])])
    numbers = torch.tensor([[1.0, 50, 50], [2.0, 50, 50]])
    monkeypatch.setattr(drift, "arriving", [drift.Arriving(watch, what, numbers, arrived)])
    ready = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drift.read_arrived()
        ready = True
        with monkeypatch.context() as patch:  # during a capture an event must not even be asked
            patch.setattr(torch.cuda, "is_initialized", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            drift.read_arrived()
    with pytest.warns(UserWarning, match="the branch Linear: .* a norm of 2 instead of 1"):
        drift.read_arrived()
    assert not drift.arriving


@pytest.mark.parametrize(("share", "warns"), [(0.005, False), (0.02, True)])
def test_the_share_of_positive_entries_that_may_change_is_one_of_all_entries(share, warns):
    then = torch.zeros(100, 100)
    then[:50] = 1
    now = then.clone()
    now.view(-1)[-round(share * now.numel()) :] = 1e-6
    watch = drift.Drift(nn.ReLU())
    watch.note(then)
    watch.note_rebuilt(0, now)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch.compare()
        read_all()
    expected = [True] if warns else []
    assert ["has 52.0 % positive entries instead of 50.0 %" in str(warning.message) for warning in caught] == expected


def test_a_watched_branch_that_saves_something_else_in_the_recomputation_is_an_error():
    """It saves a tensor of one dimension, for which the watch compares no statistics."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = Notes()

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(None)
            return x.flatten().tanh().view_as(x) if len(self.seen) == STEPS + 1 else x.tanh()

    module = InvertibleModuleWrapper(AdditiveCoupling(Flat(), nn.Identity()))
    outputs = [module(images(8, 16, dtype=torch.float32)) for _ in range(STEPS)]
    with refused(RuntimeError, "Flat computed something else in the recomputation"):
        weighted_sum(outputs[-1]).backward()
