"""Train a reversible classifier on CIFAR-10 beside its twin, which stores every activation.

    MEMCNN_DATA=folder python examples/train_cifar.py irevnet      # or vit, momentum

Both networks start from the same weights and see the same batches. Prints the loss of both, the peak memory of a step,
and, for the first step, how far gradients are from the twin's with and without exact mode. Takes about a minute on one
core of a laptop. Without MEMCNN_DATA and --data it downloads CIFAR-10 (170 MB); ``--data generated`` needs no files.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.data import load, normalise
from memcnn.memory import measure_step_memory
from memcnn.models.irevnet import IRevNet
from memcnn.models.momentum import MomentumResNet
from memcnn.models.resnet import basic_branch
from memcnn.models.reversible_vit import ReversibleViT

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "irevnet": partial(IRevNet, (2, 2, 2), initial=2, width=16),  # injective: four channels of zeros
    "vit": partial(ReversibleViT, 8, 48, 3),
    "momentum": partial(MomentumResNet, lambda width: basic_branch(width, width), (6, 6, 6), 8),
}


def made(name: str, **options: bool) -> nn.Module:
    """Return the network, with the same weights each time."""
    torch.manual_seed(0)
    return NETWORKS[name](**options)


def gradients(net: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the gradients of the parameters."""
    return list(torch.autograd.grad(F.cross_entropy(net(images), labels), list(net.parameters())))


def error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the norm of the difference of two lists of gradients, relative to that of the expected ones."""
    a, b = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (actual, expected))
    return ((a - b).norm() / b.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="folder of CIFAR-10, or the word generated (default: $MEMCNN_DATA, else ./data)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the two networks then compute the same bits
    data = load("cifar10", args.data)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(data.train_labels), (args.batch,), generator=torch.Generator().manual_seed(step))
        return normalise(data.train_images[chosen], data.mean), data.train_labels[chosen]

    for exact in (True, False):
        net, twin = (made(args.network, exact=exact, disable=disable) for disable in (False, True))
        difference = error(gradients(net, *batch(0)), gradients(twin, *batch(0)))
        print(f"exact={exact}: relative error of the first step's gradients {difference:.1e}")

    net, twin = (made(args.network, exact=True, disable=disable) for disable in (False, True))
    for label, model in (("reversible", net), ("twin", twin)):
        memory = measure_step_memory(model, lambda model=model: gradients(model, *batch(0)))
        print(f"{label}: {memory.activation_bytes / 2**20:.1f} MiB of activations")
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in (net, twin)]
    recent: list[float] = []
    for step in range(args.steps):
        losses = []
        for model, optimizer in zip((net, twin), optimizers, strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch(step)[0]), batch(step)[1])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        recent = [*recent[-19:], losses[0]]
        if step % 20 == 0 or step == args.steps - 1:
            same = "the same" if losses[0] == losses[1] else f"{losses[1]:.4f}"
            mean = sum(recent) / len(recent)
            print(f"step {step:4}: loss {losses[0]:.4f}, twin's {same}; mean of the last 20: {mean:.3f}", flush=True)


if __name__ == "__main__":
    main()
