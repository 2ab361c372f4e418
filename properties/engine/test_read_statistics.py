"""Branches and hooks that read a norm's running statistics, and branches that switch its mode."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.engine.buffers import hook_reads_statistics, reads_statistics
from properties.support.scaled import PROGRAMS, chain
from properties.support.twin import assert_same, backward, block, images, plain_twin, run

pytestmark = pytest.mark.usefixtures("on_device")


class Normed(nn.Module):
    """A branch with a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)


class OtherStatistics(Normed):
    def forward(self, x: Tensor) -> Tensor:
        kept = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=False)
        return (kept + self.norm(x)).tanh()


class Centred(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean).tanh() * self.norm(x)

    @property
    def mean(self) -> Tensor:
        return self.norm.running_mean


class InBothModes(Normed):
    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        kept = self.norm(x)
        self.norm.train()
        return (kept + self.norm(x)).tanh()


class WarmedUp(Normed):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y.tanh() if count_of(self.norm) > 1 else y.sin()


def count_of(norm: nn.Module) -> Tensor:
    return getattr(norm, "num_batches_tracked")  # noqa: B009  the name is found in a string too


class InTurns(Normed):
    """Switches the mode of its BatchNorm at every call, and leaves it."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.norm.train(self.calls % 2 == 0)
        return self.norm(x).tanh()


class Ordinary(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).tanh() if self.training else x


class Beside(nn.Module):
    """Reads the statistics of a norm that it does not register as a submodule."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = (norm,)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norms[0].running_mean.clone()


class ReadLater(nn.Sequential):
    def __init__(self, affine: bool = True) -> None:
        norm = nn.BatchNorm1d(3, affine=affine)
        super().__init__(nn.Linear(3, 3), norm, Beside(norm), nn.Tanh())


READERS = [OtherStatistics, Centred, InBothModes, WarmedUp, InTurns]


@PROGRAMS
@pytest.mark.parametrize("branch", [*READERS, ReadLater, functools.partial(ReadLater, affine=False)])
def test_a_branch_that_reads_running_statistics_is_replayed(branch, program):
    module = chain(branch)
    twin = plain_twin(module)
    for _ in range(2):
        assert_same(run(module, program, [images(5, 6)]), run(twin, program, [images(5, 6)]), limit=1e-10)
    assert [m.training for m in module.modules()] == [m.training for m in twin.modules()]


def test_one_branch_in_both_places_that_switches_a_mode_leaves_the_last_mode():
    torch.manual_seed(0)
    shared = InTurns().double()
    module = block(lambda: shared)
    twin = plain_twin(module)
    assert_same(run(module, backward, [images(5, 6)]), run(twin, backward, [images(5, 6)]), limit=1e-10)
    assert [m.training for m in module.modules()] == [m.training for m in twin.modules()]


def centred(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output + module.running_mean.clone()


class Centring:
    """Hooks of other kinds: a method, and an object that can be called."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def hook(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output + self.mean(module)

    def mean(self, module: nn.Module) -> Tensor:
        return self.scale * module.running_mean.clone()

    __call__ = hook


def late(scale: float, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return scale * centred(module, inputs, output)


HOOKS = {
    "function": centred,
    "lambda": lambda module, inputs, output: centred(module, inputs, output).sin(),
    "partial": functools.partial(late, 0.5),
    "method": Centring(2.0).hook,
    "object": Centring(0.5),
}


@PROGRAMS
@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("affine", [True, False])
def test_a_hook_that_reads_running_statistics_is_replayed(hook, affine, program):
    def branch() -> nn.Module:
        norm = nn.BatchNorm1d(3, affine=affine)
        norm.register_forward_hook(hook)
        return nn.Sequential(nn.Linear(3, 3), norm, nn.Tanh(), nn.Linear(3, 3))

    module = chain(branch)
    twin = plain_twin(module)
    for _ in range(2):
        assert_same(run(module, program, [images(5, 6)]), run(twin, program, [images(5, 6)]), limit=1e-10)


@pytest.mark.parametrize(
    ("hook", "reads"), [(h, True) for h in HOOKS.values()] + [(print, False), (lambda m, i, o: o.sin(), False)]
)
def test_statistics_are_copied_only_for_hooks_that_may_read_them(hook, reads):
    assert hook_reads_statistics(hook) == reads


@pytest.mark.parametrize("kind", [*READERS, Ordinary])
def test_statistics_are_copied_only_for_code_that_may_read_them(kind):
    assert reads_statistics(kind) == (kind is not Ordinary)
