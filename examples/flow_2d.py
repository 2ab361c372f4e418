"""A normalising flow on points in the plane: train it by maximum likelihood, draw its density, check its integral.

python examples/flow_2d.py [PICTURE.png]
"""

import math
import sys

import torch
from torch import Tensor, nn

import memcnn

STEPS, BLOCKS, WIDTH = 200, 4, 32


def two_moons(count: int) -> Tensor:
    """Return points (count, 2) on two interleaved half circles, with noise."""
    angle = math.pi * torch.rand(count)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    points = torch.where(torch.rand(count, 1) < 0.5, upper, -upper)
    return points + 0.08 * torch.randn(count, 2)


def flow() -> memcnn.ReversibleSequential:
    """Return affine couplings of the two coordinates, with a learned mixture of these between them."""

    def branch() -> nn.Module:
        layers = [nn.Linear(1, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)]
        return nn.Sequential(*layers)  # a scale and a shift for the other coordinate

    blocks: list[nn.Module] = []
    for _ in range(BLOCKS):
        coupling = memcnn.AffineCoupling(branch(), branch(), adapter=memcnn.AffineAdapterExp)
        blocks += [memcnn.ActNorm(2), memcnn.InvertibleConv1x1(2), coupling]
    return memcnn.ReversibleSequential(*blocks)


def log_density(model: memcnn.ReversibleSequential, x: Tensor) -> Tensor:
    """Return log p(x), shape (N,), in nats: that of a normal distribution at y = model(x), plus log|det dy/dx|."""
    y, log_det = model.forward_log_det(x)
    return -0.5 * y.square().sum(1) - math.log(2 * math.pi) + log_det


def draw(model: memcnn.ReversibleSequential, path: str) -> float:
    """Write a picture of the density beside samples; return the density's integral over the picture."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    side = torch.linspace(-2.5, 2.5, 200)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = log_density(model, grid).exp().view(200, 200)
        samples = model.inverse(torch.randn(2000, 2))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.4), layout="constrained")
    left.imshow(density.T.numpy(), origin="lower", extent=(-2.5, 2.5, -2.5, 2.5), cmap="viridis")
    left.set_title("density of the flow")
    right.scatter(*samples.T.numpy(), s=2)
    right.set(title="2,000 samples of the flow", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
    figure.savefig(path, dpi=100)
    return float(density.sum() * (side[1] - side[0]) ** 2)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = flow()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    test = two_moons(2000)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = -log_density(model, two_moons(256)).mean()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:>3}: {loss:.3f} nats a point")
    model.eval()
    with torch.no_grad():
        print(f"test: {-log_density(model, test).mean():.3f} nats a point")
    path = sys.argv[1] if len(sys.argv) > 1 else "flow_2d.png"
    print(f"integral of the density over the picture: {draw(model, path):.3f}\nWritten {path}")


if __name__ == "__main__":
    main()
