"""The cost of a reversible step besides its arithmetic: the numbers of dispatched operators and of Python calls.

Where kernels are small, these numbers decide how long a step takes. Counts do not depend on the machine.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import memcnn
from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.kernels import BatchNormReLU2d, SkippedReLU
from memcnn.models.resnet import Branch, revnet38
from properties.support.compiler import ignore_compiler_warnings
from properties.support.twin import assert_like_twin, backward, block, conv_branch, images

REVERSIBLE_UNITS = 3, 2, 2
"""Reversible units in each stage of RevNet-38. Each has two branches of two convolutions, 26 of 28 with BatchNorm."""
CHAINS = len(REVERSIBLE_UNITS)
BRANCHES = 2 * sum(REVERSIBLE_UNITS)


class Operators(TorchDispatchMode):
    """A context that counts the operators dispatched within it, by name and, for casts, by the new dtype."""

    only_watches = True

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types: Sequence[type], args: tuple = (), kwargs: dict | None = None):
        name = function.overloadpacket.__name__
        dtype = (kwargs or {}).get("dtype")
        self.counts[f"{name} {dtype}" if name == "_to_copy" else name] += 1
        return function(*args, **(kwargs or {}))


def operators_of_a_step(**options) -> Counter[str]:
    """Operators of one training step of RevNet-38 on channels_last images, in bfloat16."""
    torch.manual_seed(0)
    model = revnet38(**options).to(memory_format=torch.channels_last)
    x = images(2, 3, 32, 32, dtype=torch.float32, requires_grad=False).to(memory_format=torch.channels_last)
    with Operators() as operators:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
        F.cross_entropy(logits.float(), torch.tensor([1, 2])).backward()
    return operators.counts


def test_a_step_of_a_revnet_copies_and_joins_once_a_chain():
    counts = operators_of_a_step()
    assert counts["cat"] == 2 * CHAINS, "joins: one forward, one backward"
    assert counts["clone"] == CHAINS, "the dense copy of the half that a chain's first branch is given"
    assert counts["copy_"] == CHAINS + 1, "the same half rebuilt in those strides; the largest size of a tensor"


def test_the_recomputation_adds_its_arithmetic_and_casts_alone():
    counts, plain = operators_of_a_step(), operators_of_a_step(disable=True)
    added = {
        name: counts[name] - plain[name]
        for name in (
            "convolution",
            "native_batch_norm",
            "relu_",
            "add_",
            "_to_copy torch.bfloat16",
            "_to_copy torch.float32",
        )
    }
    assert added == {
        "convolution": 2 * BRANCHES,
        "native_batch_norm": 2 * BRANCHES - 2,  # the very first unit's branches have one each
        "relu_": 2 * BRANCHES - 2,
        "add_": 0,  # no counter of batches moves
        "_to_copy torch.bfloat16": 3 * BRANCHES,  # a branch's input and its two weights
        "_to_copy torch.float32": 0,
    }


def test_a_recomputation_does_not_touch_the_running_statistics():
    module = InvertibleModuleWrapper(AdditiveCoupling(conv_branch(6), split_dim=0)).double()  # halves are dense
    y = module(images())
    versions = {name: b._version for name, b in module.named_buffers()}
    with Operators() as operators:
        y.sum().backward()
    assert {name: b._version for name, b in module.named_buffers()} == versions
    assert not operators.counts["copy_"] and not operators.counts["clone"]
    assert all(part.track_running_stats for part in module.modules() if isinstance(part, nn.BatchNorm2d))


def test_a_fused_norm_costs_no_copies_of_its_running_statistics():
    """The engine knows this class, so it need not read its code to see how it uses them."""
    branches = [nn.Sequential(BatchNormReLU2d(6), SkippedReLU(), nn.Conv2d(6, 6, 1)) for _ in range(2)]
    module = InvertibleModuleWrapper(AdditiveCoupling(*branches, split_dim=0))
    x = images(dtype=torch.float32)
    with Operators() as operators:
        y = module(x)
    assert operators.counts["batch_statistics"] == 2
    statistics = {name: (b._version, b.clone()) for name, b in module.named_buffers()}
    with Operators() as again:
        y.sum().backward()
    assert again.counts["batch_statistics"] == 2, "they return what they kept"
    for counts in (operators.counts, again.counts):
        assert not counts["copy_"] and not counts["clone"]
    for name, b in module.named_buffers():
        assert torch.equal(b, statistics[name][1]), name


def norm_without_parameters() -> nn.Module:
    """Return a branch that is recomputed with its running statistics: its BatchNorm has no weight."""
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False), nn.Tanh())


def compiled_branch() -> nn.Module:
    branch = Branch(*conv_branch(6))
    branch.compile(backend="aot_eager")
    return branch


@ignore_compiler_warnings
@pytest.mark.parametrize("make", [norm_without_parameters, compiled_branch])
def test_a_recomputation_that_needs_running_statistics_writes_to_other_memory(make):
    module = InvertibleModuleWrapper(AdditiveCoupling(make(), split_dim=0)).double()  # halves are dense
    backward(module, images())
    before = {name: b.clone() for name, b in module.named_buffers()}
    y = module(images())
    memory = {name: b.data_ptr() for name, b in module.named_buffers()}
    after = {name: b.clone() for name, b in module.named_buffers()}
    # under a dispatch mode compiled code would not run
    with nullcontext() if make is compiled_branch else Operators() as operators:
        y.sum().backward()
    for name, b in module.named_buffers():
        assert b.data_ptr() == memory[name] and torch.equal(b, after[name]) and not torch.equal(b, before[name])
    assert operators is None or not operators.counts["clone"]


@pytest.mark.parametrize("views", [False, True])
def test_running_statistics_that_two_modules_share_are_seen_by_both(views):
    """The second BatchNorm, in evaluation mode, reads what the first one has written."""

    def branch() -> nn.Module:
        first, second = nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3).eval()
        mean, var = first.running_mean, first.running_var
        second.running_mean, second.running_var = (mean[:], var[:]) if views else (mean, var)
        return nn.Sequential(first, nn.Conv2d(3, 3, 1), second)

    gradients = []
    for disable in (False, True):
        torch.manual_seed(0)
        module = InvertibleModuleWrapper(AdditiveCoupling(branch(), branch()), disable=disable).double()
        x = images()
        (module(x) ** 3).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


class Renormalised(nn.BatchNorm2d):
    """A BatchNorm whose output depends on its running mean even in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.running_mean.clone().view(1, -1, 1, 1).cos()


class Checkpointed(nn.BatchNorm2d):
    """A BatchNorm that autograd records within a checkpoint, where the engine does not see what it saves."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: F.batch_norm(x, None, None, self.weight, self.bias, True), x, use_reentrant=False)


def patched(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    forward = norm.forward
    norm.forward = lambda x: forward(x) * norm.running_mean.clone().view(1, -1, 1, 1).cos()
    return norm


NORMS = {
    "batch norm": nn.BatchNorm2d,
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None),
    "without parameters": lambda c: nn.BatchNorm2d(c, affine=False),
    "without running statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "in evaluation mode": lambda c: nn.BatchNorm2d(c).eval(),
    "frozen parameters": lambda c: nn.BatchNorm2d(c).requires_grad_(False),
    "instance norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "a subclass that reads its running mean": Renormalised,
    "a checkpoint within": Checkpointed,
}


@pytest.mark.parametrize("name", NORMS)
def test_every_norm_moves_and_differentiates_as_its_twins(name):
    def branch() -> nn.Module:
        first, second = NORMS[name](3), NORMS[name](3)
        return nn.Sequential(first, nn.Conv2d(3, 3, 3, padding=1), second, nn.Tanh(), second)

    def twice(module: nn.Module, x: Tensor) -> Tensor:
        """The statistics have moved on when the first of two forward passes is differentiated."""
        y = module(x) + module(x + 1)
        (y * y).sum().backward()
        return y

    for program in (backward, twice):
        module = InvertibleModuleWrapper(AdditiveCoupling(branch(), branch())).double()
        assert_like_twin(nn.Sequential(module, block()), program, images())


def test_a_forward_set_on_the_module_itself_may_read_its_running_mean():
    gradients = []
    for disable in (False, True):
        module = InvertibleModuleWrapper(AdditiveCoupling(patched(3), patched(3)), disable=disable).double()
        x = images()
        ((module(x) + module(x + 1)) ** 3).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def small_branch() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
    )


def sequence(depth: int) -> nn.Module:
    return ReversibleSequential(*(AdditiveCoupling(small_branch(), small_branch()) for _ in range(depth)))


def wrapped(depth: int) -> nn.Module:
    return nn.Sequential(
        *(InvertibleModuleWrapper(AdditiveCoupling(small_branch(), small_branch())) for _ in range(depth))
    )


def plain(depth: int) -> nn.Module:
    module = wrapped(depth)
    for unit in module:
        unit.disable = True
    return module


def step(module: nn.Module, *, accumulate: bool) -> None:
    if not accumulate:
        module.zero_grad()
    module(torch.ones(2, 8, 4, 4, requires_grad=True)).sum().backward()


def operators(module: nn.Module, accumulate: bool) -> int:
    step(module, accumulate=accumulate)  # gradients are added to afterwards, if they are kept
    with Operators() as counted:
        step(module, accumulate=accumulate)
    return counted.counts.total()


def calls_of_ours(module: nn.Module, accumulate: bool) -> int:
    """Calls of functions of this package in one step, other than comprehensions, which newer Pythons do not call."""
    for _ in range(2):  # where gradients accumulate, the second step is the first that takes branches one by one
        step(module, accumulate=accumulate)
    calls, folder = 0, memcnn.__path__[0]

    def count(frame, event: str, _) -> None:
        nonlocal calls
        code = frame.f_code
        calls += event == "call" and code.co_filename.startswith(folder) and not code.co_name.startswith("<")

    previous = sys.getprofile()
    sys.setprofile(count)
    try:
        step(module, accumulate=accumulate)
    finally:
        sys.setprofile(previous)
    return calls


def for_each_block(counted, make, accumulate: bool) -> float:
    return (counted(make(6), accumulate) - counted(make(2), accumulate)) / 4


@pytest.mark.parametrize(
    ("make", "accumulate", "added_operators", "calls"),
    [
        (sequence, False, 14, 17),
        (wrapped, False, 30, 91),
        (sequence, True, 40, 229),
        (wrapped, True, 50, 242),
    ],
)
def test_a_further_block_adds_no_more_operators_and_calls_than_these(make, accumulate, added_operators, calls):
    """Measured when it was written. A change that needs more makes small networks slower, and must be worth it.

    Of the operators 20 are the layers' second evaluation with what it allocates, two the differences; the others
    detach tensors from their graphs. Without earlier gradients the blocks go the direct way, which saves some of what
    plain autograd does: it detaches fewer tensors. Where gradients are added to earlier ones, the ordinary graph is
    recorded.
    """
    added = for_each_block(operators, make, accumulate) - for_each_block(operators, plain, accumulate)
    assert added <= added_operators
    assert for_each_block(calls_of_ours, make, accumulate) <= calls
