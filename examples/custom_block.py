"""A reversible block of your own, checked against every law: a leapfrog step of a Hamiltonian network.

python examples/custom_block.py

The state is a position q and a momentum p. A leapfrog step changes p by a force that depends on q alone, then q by p,
then p again. Each change can be subtracted, so the step is invertible whatever the force is.
"""

import torch
from torch import Tensor, nn

import memcnn
from memcnn.testing import check_all


class Leapfrog(nn.Module):
    """(N, 2 * channels, H, W) to the same shape, in steps of ``size``."""

    def __init__(self, channels: int = 8, size: float = 0.5):
        super().__init__()
        self.force = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.Tanh())
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Return the state after the step."""
        q, p = x.chunk(2, 1)
        p = p + 0.5 * self.size * self.force(q)
        q = q + self.size * p
        p = p + 0.5 * self.size * self.force(q)
        return torch.cat([q, p], 1)

    def inverse(self, y: Tensor) -> Tensor:
        """Return the state before the step: the three changes are subtracted in the opposite order."""
        q, p = y.chunk(2, 1)
        p = p - 0.5 * self.size * self.force(q)
        q = q - self.size * p
        p = p - 0.5 * self.size * self.force(q)
        return torch.cat([q, p], 1)


class Faulty(Leapfrog):
    """The same step with a typical fault: the inverse has the sign of its last change wrong."""

    def inverse(self, y: Tensor) -> Tensor:
        q, p = y.chunk(2, 1)
        p = p - 0.5 * self.size * self.force(q)
        q = q - self.size * p
        p = p + 0.5 * self.size * self.force(q)
        return torch.cat([q, p], 1)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)

    report = check_all(Leapfrog(), x)
    print(report)
    print(f"\nLeapfrog: {report.summary()}")
    assert report.passed

    faulty = check_all(Faulty(), x, laws=["inverse"])
    print(f"Faulty: {faulty.summary()}")
    assert not faulty.passed

    chain = memcnn.ReversibleSequential(*(Leapfrog() for _ in range(20)))
    chain(x.requires_grad_()).square().mean().backward()
    print(f"20 steps trained: the gradient of the input has norm {x.grad.norm():.4f}")


if __name__ == "__main__":
    main()
