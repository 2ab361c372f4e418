"""The full training step of the six CIFAR networks, RevNets with the engine on and off."""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from bench.cases import Case, Step
from memcnn import cli
from memcnn.models.resnet import MODELS
from memcnn.training.recipe import PUBLISHED


@dataclass(frozen=True)
class Network(Case):
    """A network on a batch of shape (batch, 3, 32, 32).

    Attributes:
        network: a key of ``MODELS``.
        subject: "plain" runs reversible units by ordinary autograd, "reversible" with the engine.
        batch: number of images.
        series: name of the case's series.
        mode: a key of ``bench.modes.MODES``.
    """

    network: str
    subject: str
    batch: int
    series: str = "network"
    mode: str = "eager"

    @property
    def group(self) -> str:
        return f"{self.series}-{self.network}-batch{self.batch}"

    @property
    def cycle(self) -> str:
        return self.series

    def model(self, device: str | torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return MODELS[self.network](disable=self.subject == "plain").to(device)

    def step(self, model: nn.Module, device: str | torch.device, autocast: Callable = nullcontext) -> Step:
        """Return a step with the published recipe's optimiser, at a rate that hardly moves the weights."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.batch, 3, 32, 32, generator=generator).to(device)
        labels = torch.randint(10, (self.batch,), generator=generator).to(device)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=1e-4, momentum=PUBLISHED.momentum, weight_decay=PUBLISHED.weight_decay
        )

        def run() -> None:
            optimizer.zero_grad()
            with autocast():
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()

        return Step(run, (images, labels), optimizer)


def networks(*, quick: bool, cuda: bool, series: str = "network") -> list[Network]:
    """Return each RevNet with the engine on and off, and the ResNets, which have no engine to switch."""
    names = ("resnet32", "revnet38") if quick else MODELS
    batch = PUBLISHED.batch_size if cuda else 8
    return [
        Network(name, subject, batch, series)
        for name in names
        for subject in (("plain", "reversible") if name.startswith("revnet") else ("plain",))
    ]


def add_networks_option(parser: argparse.ArgumentParser) -> None:
    """Add --networks, a list of names in ``MODELS``; all six by default."""
    parser.add_argument(
        "--networks",
        type=cli.names(tuple(MODELS)),
        default=list(MODELS),
        metavar="A,B,...",
        help=f"some of {','.join(MODELS)}",
    )
