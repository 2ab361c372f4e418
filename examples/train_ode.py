"""Fit a density in the plane with a continuous normalising flow, solved by the reversible Heun method.

    python examples/train_ode.py

A field f(t, y) moves the points of two half moons to a normal distribution. The third entry of the state integrates its
divergence, so that log p(y(0)) = log N(y(1)) + the integral (Chen et al., arXiv:1806.07366, section 4). Prints the
negative log-likelihood, memory against the number of steps, and draws the density. About a minute on one core.
"""

import argparse
import math

import torch
from PIL import Image
from torch import Tensor, nn

from memcnn.memory import measure_step_memory
from memcnn.models.ode import ReversibleHeun


class FieldWithDivergence(nn.Module):
    """(y, _) -> (f(t, y), div f), for f(t, y) = W2 tanh(W1 y + b(t)), whose divergence is known."""

    def __init__(self, hidden: int = 64):
        super().__init__()
        self.inner = nn.Linear(2, hidden)
        self.time = nn.Linear(1, hidden)
        self.outer = nn.Linear(hidden, 2)

    def forward(self, t: Tensor, state: Tensor) -> Tensor:
        h = torch.tanh(self.inner(state[:, :2]) + self.time(t.view(1, 1)))
        weights = (self.outer.weight.T * self.inner.weight).sum(1)  # d f_i / d y_i through each hidden unit, summed
        return torch.cat((self.outer(h), ((1 - h.square()) * weights).sum(1, keepdim=True)), 1)


def two_moons(count: int) -> Tensor:
    """Return points of two half circles with noise, (count, 2)."""
    angle, upper = math.pi * torch.rand(count), torch.rand(count) < 0.5
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle)) - 0.5
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle)) - 0.25
    return 1.5 * torch.stack((x, y), 1) + 0.1 * torch.randn(count, 2)


def log_prob(solver: ReversibleHeun, y: Tensor) -> Tensor:
    """Return the log-density of points y (N, 2), shape (N,)."""
    end = solver(torch.cat((y, torch.zeros(len(y), 1)), 1))
    return end[:, 2] - 0.5 * end[:, :2].square().sum(1) - math.log(2 * math.pi)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training-steps", type=int, default=300)
    parser.add_argument("--solver-steps", type=int, default=12)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--out", default="density.png")
    args = parser.parse_args()
    torch.manual_seed(0)
    field = FieldWithDivergence()
    solver = ReversibleHeun(field, args.solver_steps)
    optimizer = torch.optim.Adam(field.parameters(), 1e-2)
    recent: list[float] = []
    for step in range(args.training_steps):
        optimizer.zero_grad()
        loss = -log_prob(solver, two_moons(args.batch)).mean()
        loss.backward()
        optimizer.step()
        recent = [*recent[-19:], loss.item()]
        if step % 50 == 0 or step == args.training_steps - 1:
            print(f"step {step:4}: negative log-likelihood {sum(recent) / len(recent):.3f}", flush=True)

    points = two_moons(args.batch)
    for steps in (args.solver_steps, 10 * args.solver_steps):
        sizes = []
        for disable in (False, True):
            other = ReversibleHeun(field, steps, disable=disable)
            memory = measure_step_memory(other, lambda other=other: log_prob(other, points).mean().backward())
            sizes.append(memory.activation_bytes / 1024)
        print(f"{steps} solver steps: {sizes[0]:.0f} KiB of activations; stored {sizes[1]:.0f} KiB")

    side, reach = 200, 3.0
    axis = torch.linspace(-reach, reach, side)
    grid = torch.cartesian_prod(axis.flip(0), axis).flip(1)  # rows from the top, x in columns
    with torch.no_grad():
        density = log_prob(solver, grid).exp()
    cell = (2 * reach / (side - 1)) ** 2
    print(f"the density sums to {density.sum().item() * cell:.3f} over the square of side {2 * reach:g}")
    grey = (255 * (density / density.max()).sqrt()).to(torch.uint8)
    Image.fromarray(grey.view(side, side).numpy()).save(args.out)
    print(f"the density as a picture: {args.out}")


if __name__ == "__main__":
    main()
