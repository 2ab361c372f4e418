"""A network of 200 blocks in the activation memory of two: measured in bytes, beside ordinary autograd.

python examples/deep_network.py
"""

import torch
from torch import nn

import memcnn
from memcnn.memory import measure_step_memory

CHANNELS, SHAPE = 16, (4, 16, 16, 16)


def branch() -> nn.Module:
    """Return a pre-activation branch that keeps (N, CHANNELS / 2, H, W)."""
    half = CHANNELS // 2
    return nn.Sequential(nn.BatchNorm2d(half), nn.ReLU(), nn.Conv2d(half, half, 3, padding=1, bias=False))


def activation_bytes(depth: int, *, reversible: bool) -> int:
    """Return what one training step of ``depth`` blocks needs beyond parameters, gradients and input, in bytes."""
    torch.manual_seed(0)
    chain = memcnn.ReversibleSequential(*(memcnn.AdditiveCoupling(branch(), branch()) for _ in range(depth)))
    for block in chain:
        block.disable = not reversible
    x = torch.randn(SHAPE)
    return measure_step_memory(chain, lambda: chain(x).square().mean().backward()).activation_bytes


def main() -> None:
    torch.set_num_threads(1)
    print(f"activations of a training step on an input of {SHAPE}, in bytes\n")
    print(f"{'blocks':>6}  {'ordinary autograd':>17}  {'reversible':>12}")
    measured = {
        depth: (activation_bytes(depth, reversible=False), activation_bytes(depth, reversible=True))
        for depth in (2, 20, 200)
    }
    for depth, (plain, reversible) in measured.items():
        print(f"{depth:>6}  {plain:>17,}  {reversible:>12,}")
    assert measured[200][1] <= measured[2][1]
    print(f"\n200 blocks need {measured[200][0] / measured[200][1]:.0f} times less than with ordinary autograd.")


if __name__ == "__main__":
    main()
