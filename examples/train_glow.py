"""Fit Glow to CIFAR-10: the bits per dimension fall, and samples are written as a picture.

    MEMCNN_DATA=folder python examples/train_glow.py

A small flow (three scales of four steps) for about a minute on one core of a laptop; the paper trains 32 steps of 512
channels for days, to 3.35 bits. 8 bits are those of uniform noise. ``--data generated`` needs no files.
"""

import argparse

import torch
from PIL import Image

from memcnn.data import load
from memcnn.memory import measure_step_memory
from memcnn.models.glow import Glow, bits_per_dimension


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--depth", type=int, default=4, help="steps of the flow at each scale")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--out", default="glow_samples.png")
    parser.add_argument("--data", help="folder of CIFAR-10, or the word generated (default: $MEMCNN_DATA, else ./data)")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = load("cifar10", args.data)
    flow = Glow((3, 32, 32), 3, args.depth, 32)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-3)
    recent: list[float] = []
    for step in range(args.steps):
        images = data.train_images[torch.randint(len(data.train_images), (args.batch,))]
        optimizer.zero_grad()
        loss = bits_per_dimension(flow, images)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 50.0)
        optimizer.step()
        recent = [*recent[-9:], loss.item()]
        if step % 20 == 0 or step == args.steps - 1:
            print(f"step {step:4}: {sum(recent) / len(recent):.3f} bits per dimension", flush=True)

    with torch.no_grad():
        test = bits_per_dimension(flow.eval(), data.test_images[:200])
    print(f"200 test images: {test.item():.3f} bits per dimension")
    samples = (256 * (flow.sample(32, args.temperature) + 0.5)).clamp(0, 255).to(torch.uint8)
    rows = samples.view(4, 8, 3, 32, 32).permute(0, 3, 1, 4, 2).reshape(128, 256, 3)
    Image.fromarray(rows.numpy()).save(args.out)
    print(f"32 samples at temperature {args.temperature}: {args.out}")
    for disable in (False, True):
        model = Glow((3, 32, 32), 3, args.depth, 32, disable=disable)
        memory = measure_step_memory(model, lambda model=model: bits_per_dimension(model, images).backward())
        print(f"{'twin' if disable else 'reversible'}: {memory.activation_bytes / 2**20:.1f} MiB of activations")


if __name__ == "__main__":
    main()
