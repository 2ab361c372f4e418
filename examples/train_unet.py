"""Segment generated volumes with a U-Net whose stages are reversible.

    python examples/train_unet.py

Each volume holds a ball of value 1 in noise of standard deviation 1. Prints the loss, the Dice overlap on new volumes,
and memory with two and with eight blocks a stage. Takes about a minute on one core of a laptop.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from memcnn.memory import measure_step_memory
from memcnn.models.reversible_unet import ReversibleUNet


def balls(count: int, size: int) -> tuple[Tensor, Tensor]:
    """Return volumes (count, 1, size, size, size), and where the ball is, of the same shape with values 0 and 1."""
    axis = torch.arange(size, dtype=torch.float32)
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centre = size * (0.3 + 0.4 * torch.rand(count, 3, 1, 1, 1))
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1, 1))
    inside = ((place - centre).square().sum(1).sqrt() < radius).float().unsqueeze(1)
    return inside + torch.randn_like(inside), inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=16)
    args = parser.parse_args()
    torch.manual_seed(0)
    net = ReversibleUNet(1, 1, (8, 16), 2, dims=3)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    recent: list[float] = []
    for step in range(args.steps):
        volumes, wanted = balls(args.batch, args.size)
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(net(volumes), wanted)
        loss.backward()
        optimizer.step()
        recent = [*recent[-9:], loss.item()]
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:4}: loss {sum(recent) / len(recent):.3f}", flush=True)

    volumes, wanted = balls(8, args.size)
    with torch.no_grad():
        found = (net(volumes) > 0).float()
    dice = 2 * (found * wanted).sum() / (found.sum() + wanted.sum())
    threshold = (volumes > 0.5).float()
    of_threshold = 2 * (threshold * wanted).sum() / (threshold.sum() + wanted.sum())
    print(f"Dice overlap on 8 new volumes: {dice.item():.3f}; of a threshold at one half: {of_threshold.item():.3f}")
    for blocks in (2, 8):
        sizes = []
        for disable in (False, True):
            other = ReversibleUNet(1, 1, (8, 16), blocks, dims=3, disable=disable)
            memory = measure_step_memory(other, lambda other=other: other(volumes[:2]).mean().backward())
            sizes.append(memory.activation_bytes / 2**20)
        print(f"{blocks} blocks a stage: {sizes[0]:.1f} MiB of activations; stored {sizes[1]:.1f} MiB")


if __name__ == "__main__":
    main()
