"""Parameters of the other sign: an inverse, a gradient or a log-determinant that is right for positive scales alone.

Some blocks have no inverse there, and are right: PReLU with a negative slope folds the axis. The claim does not blame
them: it looks at the determinant of the Jacobian, which has both signs, or is zero, where forward folds.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from memcnn.testing.adapters import inverse_of
from memcnn.testing.laws.jacobians import LARGEST_SAMPLE, gradients_of_each
from memcnn.testing.laws.subject import Subject, without_dropout
from memcnn.testing.tolerances import distance

SIZES = 1.0, 10.0, 0.1
"""Standard deviations of the inputs whose Jacobians are compared, relative to that of the given input; then 1."""
INPUTS = 16
"""Number of these inputs. The signs of a block that folds agree by chance, which many inputs make unlikely."""
UNDONE = 1e-6
"""Largest relative error in float64 of an inverse that counts as right."""
NO_INVERSE = (
    "forward itself has no inverse with parameters of the other sign: the determinant of its Jacobian is zero or "
    "changes its sign from input to input"
)
TOO_LARGE = (
    f"the inverse is wrong with parameters of the other sign, but forward may have none there, which is not looked at "
    f"for more than {LARGEST_SAMPLE} entries: give a smaller --shape"
)


@torch.no_grad()
def is_undone(subject: Subject) -> bool:
    """Return whether both directions run and the inverse gives the inputs back."""
    module = subject.fresh(dropout=False)
    try:
        back = subject.evaluated(inverse_of(module), subject.evaluated(module, subject.inputs))
        return distance(back, subject.inputs) <= UNDONE
    except Exception:  # other claims report it
        return False


def why_not_undone(subject: Subject) -> str:
    """Return why nobody could undo forward; empty where an inverse exists, so that the block's own one is wrong."""
    inputs = subject.inputs
    if sum(x.numel() for x in inputs) > LARGEST_SAMPLE:
        inputs = tuple(x[:1] if x.dim() else x for x in inputs)
    if sum(x.numel() for x in inputs) > LARGEST_SAMPLE:
        return TOO_LARGE
    generator = torch.Generator().manual_seed(subject.seed)
    try:
        exact = replace(subject, inputs=inputs).in_double()
        signs = {_orientation(exact, _drawn(exact.inputs, i, generator)) for i in range(INPUTS)}
    except Exception:  # it is not differentiable, or not in float64
        return ""
    return NO_INVERSE if 0 in signs or len(signs) > 1 else ""


def _drawn(inputs: Sequence[Tensor], number: int, generator: torch.Generator) -> list[Tensor]:
    """Return inputs of the same shapes as ``inputs``: these first, and then normally distributed ones."""

    def like(x: Tensor) -> Tensor:
        given = x.square().mean().sqrt().item()
        size = ([factor * given for factor in SIZES] + [1.0])[number % (len(SIZES) + 1)]
        return size * torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu").to(x)

    return [like(x) if number and x.is_floating_point() else x for x in inputs]


@torch.enable_grad()
def _orientation(subject: Subject, inputs: Sequence[Tensor]) -> int:
    """Return the sign of the Jacobian's determinant; 1 where it has none, since it is not square."""
    module = subject.plain() or subject.fresh()
    without_dropout(module)
    values = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with subject.seeded():
        outputs = subject.call(module, *values)
    flat = torch.cat([y.flatten() for y in outputs if y.is_floating_point()])
    leaves = [x for x in values if x.requires_grad]
    if len(flat) != sum(x.numel() for x in leaves):
        return 1
    rows = [gradients_of_each(flat, x, batched=subject.plain() is not None).flatten(1) for x in leaves]
    return int(torch.linalg.slogdet(torch.cat(rows, 1)).sign.item())
