"""``to_reversible`` converts blocks with sums in every form, and refuses other blocks with the reason."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.residual import Residual, convert, residual_block


class WithIdentity(Residual):
    """A residual block as in timm: its shortcut is an identity layer."""

    def __init__(self):
        super().__init__(p=0.0)
        self.shortcut = nn.Identity()

    def forward(self, x):
        return self.function(x) + self.shortcut(x)


def test_an_identity_on_the_shortcut_is_ignored_unless_it_has_a_hook():
    block, x = WithIdentity(), torch.randn(4, 6)
    assert relative_error(convert(block)(x), block(x)) <= tolerance(x.dtype, depth=2)
    block.shortcut.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(ValueError, match="its sum add has no skip connection"):
        convert(block)


class Inside(nn.Module):
    """A block with both forms of a sum in place, and a sum of three terms."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        h = self.a(x)
        h += x
        return h + self.b(h) + self.c(h).add_(1)


def test_sums_in_place_and_of_several_functions_are_read():
    block, x = Inside(), torch.randn(4, 6)
    stack = convert(block)
    assert relative_error(stack(x), block(x)) <= tolerance(x.dtype, depth=2)
    assert [len(list(f.parameters())) for f in (stack.parts[0].chain[0]._fn.Fm, stack.parts[0].chain[0]._fn.Gm)] == [
        2,
        4,
    ]


def hooked() -> nn.Module:
    block = Residual()
    block.register_forward_hook(lambda *_: None)
    return block


def replaced() -> nn.Module:
    block = Residual()
    block.forward = lambda x: x
    return block


def with_unused() -> nn.Module:
    block = Residual()
    block.unused = nn.Linear(2, 2)
    return block


class Counting(Residual):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class InPlaceBuffer(Residual):
    def forward(self, x):
        with torch.no_grad():
            self.shift.data.add_(1)
        return super().forward(x)


REFUSED = {
    "a plain layer": (lambda: nn.Linear(6, 6), "its last operation is linear, not a sum"),
    "post-norm": (lambda: nn.TransformerEncoderLayer(6, 2), "it normalises after each sum"),
    "another activation": (
        lambda: residual_block(forward=lambda self, x: F.silu(x + self.function(x))),
        "operation is silu",
    ),
    "a scaled shortcut": (
        lambda: residual_block(forward=lambda self, x: 2 * x + self.function(x)),
        "its sum add has no skip connection",
    ),
    "data decides": (
        lambda: residual_block(forward=lambda self, x: x + self.function(x) if x.sum() > 0 else x),
        "TraceError",
    ),
    "chance decides": (
        lambda: residual_block(forward=lambda self, x: x if random.random() < 0.5 else x + self.function(x)),
        "its forward draws random numbers itself",
    ),
    "chance adds": (
        lambda: residual_block(forward=lambda self, x: x + self.function(x) + torch.rand(())),
        "its forward draws random numbers itself",
    ),
    "two structures": (
        lambda: residual_block(forward=lambda self, x: (F.relu if self.training else F.hardtanh)(x + self.function(x))),
        "its last operation is hardtanh|its structure in training mode differs",
    ),
    "a hook": (hooked, "hooks are registered on the block itself"),
    "a replaced forward": (replaced, "its forward was replaced on the object"),
    "an unused parameter": (with_unused, "does not use its parameter unused.weight"),
    "a count": (Counting, "its forward sets its attribute 'calls'"),
    "a buffer": (InPlaceBuffer, "do not change its buffers as it does|cannot be read"),
    "a tensor from numbers": (
        lambda: residual_block(forward=lambda self, x: x + self.function(x) * torch.tensor(2.0)),
        "its forward makes a tensor from numbers",
    ),
    "two outputs": (lambda: residual_block(forward=lambda self, x: (x, x)), "it returns a tuple"),
    "the input": (lambda: residual_block(forward=lambda self, x: x), "it returns its input"),
    "a broadcast": (
        lambda: residual_block(forward=lambda self, x: x + self.function(x)[None]),
        "to torch.float32 (1, 4, 6)",
    ),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_block_that_is_not_residual_is_refused_with_the_reason(make, reason):
    with pytest.raises(
        ValueError, match=r"1 of 2 blocks cannot be made reversible; .*keep_others=True:\n  1: "
    ) as error:
        convert(Residual(), make())
    assert any(part in str(error.value) for part in reason.split("|")), error.value


class Fickle(nn.Module):
    """A block that computes something else in each call."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("child", "reason"),
    [
        (Fickle(), "its output differs from that of its residual functions, relatively by"),
        (nn.ReLU(inplace=True), "its residual function modifies its input in place"),
    ],
)
def test_a_fault_that_only_the_sample_shows_is_refused(child, reason):
    block = residual_block(forward=lambda self, x: x + self.function(self.child(x)))
    block.child = child
    with pytest.raises(ValueError, match=reason):
        convert(block)
