"""Assertions that every reference network must meet."""

from collections.abc import Callable, Collection

from torch import Tensor, nn

from memcnn.testing import check_all
from memcnn.testing.laws.memory import step_bytes
from properties.support.twin import plain_twin

LAWS = ("inverse", "gradients", "state")
FINGERPRINTS = 16
"""Bytes that a coupling of two branches holds in exact mode: 8 for each branch."""


def assert_laws(module: nn.Module, *inputs: Tensor, laws: Collection[str] = LAWS, **options) -> None:
    """Assert that the invertible ``module`` meets these laws."""
    report = check_all(module, *inputs, laws=laws, **options)
    assert report.passed, str(report)


def assert_flat_in_depth(
    make: Callable[[int], nn.Module], x: Tensor, *, bytes_per_block: int = 0, depths: tuple[int, int] = (8, 32)
) -> None:
    """Assert that a training step needs the same peak bytes at two depths, parameters and their gradients apart.

    Args:
        make: makes the network of a given depth.
        x: its input.
        bytes_per_block: the bytes that each further block holds by design, such as the fingerprints of exact mode.
        depths: the two depths.
    """
    few, many = (step_bytes(make(depth), x) for depth in depths)
    assert many == few + (depths[1] - depths[0]) * bytes_per_block
    stored = step_bytes(plain_twin(make(2)), x) - step_bytes(plain_twin(make(1)), x)
    assert stored >= x.nbytes > bytes_per_block, f"the twin must store at least the input, {x.nbytes}: {stored}"
