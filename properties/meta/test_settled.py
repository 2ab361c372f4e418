"""The checks wait until buffers have converged, and soon give up on buffers that never do, such as counters."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from memcnn import AdditiveCoupling
from memcnn.testing.laws.settled import STEADY_PASSES, settled
from memcnn.testing.laws.subject import Subject


class Counting(nn.Module):
    """Counts samples in a buffer, and passes of all copies in ``passes``."""

    def __init__(self, passes: list[int]):
        super().__init__()
        self.passes = passes
        self.register_buffer("samples", torch.zeros(()))

    def __deepcopy__(self, memo: dict) -> "Counting":
        copy = Counting(self.passes)
        copy.samples.copy_(self.samples)
        return copy

    def forward(self, x: Tensor) -> Tensor:
        self.samples += len(x)
        self.passes.append(len(x))
        return x

    inverse = forward


def test_a_counter_is_given_up_after_a_hundred_passes():
    module = Counting([])
    subject = Subject(module, (torch.randn(3, 4),), 0)
    assert settled(subject) is subject
    assert len(module.passes) <= 2 * STEADY_PASSES + 5 and module.samples == 0


@pytest.mark.parametrize("ratio", [0.5, 0.95, 0.99])
def test_a_slow_power_iteration_is_waited_for(ratio):
    linear = nn.Linear(6, 6, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.diag(torch.tensor([1.0, ratio, 0.3, 0.2, 0.1, 0.05])))
    module = AdditiveCoupling(spectral_norm(linear))
    with torch.no_grad():  # almost at the second singular vector, so that the steps grow at first
        for name in ("_u", "_v"):
            vector = getattr(module.Fm.parametrizations.weight[0], name)
            vector.copy_(nn.functional.normalize(torch.tensor([1e-4, 1.0, 1e-4, 0, 0, 0]), dim=0))
    after = settled(Subject(module, (torch.randn(3, 12),), 0)).module
    assert after is not module
    torch.testing.assert_close(after.Fm.parametrizations.weight[0]._u[0].abs(), torch.tensor(1.0), rtol=1e-3, atol=0)
