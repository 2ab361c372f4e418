"""A training set and a test set as tensors on one device: read from CIFAR's files, or generated."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memcnn.data import files
from memcnn.data.files import DATASETS
from memcnn.datasets import NUM_CLASSES

GENERATED = "generated"


@dataclass(frozen=True)
class Data:
    """A training set and a test set.

    Attributes:
        train_images, test_images: uint8 of shape (N, 3, 32, 32).
        train_labels, test_labels: int64 of shape (N,).
        mean: per-pixel mean of the training images, scaled to 0..1; float32 of shape (3, 32, 32).
        num_classes: number of classes.
        official: every file has the MD5 that was published for it.
        checksums: MD5 by file name.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    num_classes: int
    official: bool
    checksums: dict[str, str]

    @property
    def kind(self) -> str:
        """Return "official", "generated" or "unofficial": the argument of ``memcnn.training.record.run_name``."""
        if self.official:
            return "official"
        return GENERATED if GENERATED in self.checksums else "unofficial"

    def to(self, device: torch.device | str) -> "Data":
        """Return the data on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def load(dataset: str, data: str | Path | None = None, *, download: bool = True, unofficial: bool = False) -> Data:
    """Return a data set on the CPU.

    Args:
        dataset: "cifar10" or "cifar100".
        data: the folder that contains torchvision's ``cifar-10-batches-py/`` or ``cifar-100-python/``, or the word
            "generated" for generated images of the same shape. By default the environment variable MEMCNN_DATA, else
            ``./data``.
        download: download missing files.
        unofficial: accept files whose MD5 differs from the published one; ``official`` of the result is then False.

    Raises:
        DataNotFound: a file is missing and could not be downloaded, or its MD5 is wrong and ``unofficial`` is False.
        BadData: a file does not contain a batch of CIFAR images.
        ValueError: there is no such data set.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    where = whereabouts(data)
    if where == GENERATED:
        return generate(NUM_CLASSES[dataset])
    folder = Path(where)
    checksums, official = files.find(dataset, folder, download=download, unofficial=unofficial)
    train, test = (files.read(dataset, folder, train=train) for train in (True, False))
    return _with_mean(train, test, NUM_CLASSES[dataset], official=official, checksums=checksums)


def whereabouts(data: str | Path | None) -> str:
    """Return the folder that ``load`` reads, or the word "generated"."""
    return str(data or os.environ.get("MEMCNN_DATA") or "data")


def _with_mean(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    num_classes: int,
    *,
    official: bool,
    checksums: dict[str, str],
) -> Data:
    """Return both sets with the mean of the training images."""
    images = train[0]
    sums = [part.sum(0, dtype=torch.float32) for part in images.split(10_000)]  # whole numbers below 2^24: exact
    total = torch.stack(sums).sum(0, dtype=torch.float64)
    return Data(
        train_images=images,
        train_labels=train[1],
        test_images=test[0],
        test_labels=test[1],
        mean=(total / len(images) / 255).float(),
        num_classes=num_classes,
        official=official,
        checksums=checksums,
    )


def generate(num_classes: int, *, train: int = 5_000, test: int = 1_000, seed: int = 0) -> Data:
    """Return generated images in CIFAR's shape. They are never official, but a network can learn them.

    A class is a smooth colour pattern (a 4 x 4 grid, enlarged to 40 x 40). An image is a random 32 x 32 part of its
    class's pattern, at a random contrast, plus noise. Equal arguments give equal images.

    Args:
        num_classes: number of classes.
        train: number of training images.
        test: number of test images.
        seed: seed of patterns and images.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(num_classes, 3, 4, 4, generator=generator)
    patterns = F.interpolate(grid, size=(40, 40), mode="bilinear", align_corners=False)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(num_classes, (count,), generator=generator)
        top, left = torch.randint(9, (2, count), generator=generator)
        contrast = 20 + 30 * torch.rand(count, 1, 1, 1, generator=generator)
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        images = contrast * windows_at(patterns[labels], top, left, size=(32, 32)) + 25 * noise + 128
        return images.round_().clamp_(0, 255).to(torch.uint8), labels

    sets = draw(train), draw(test)
    digest = hashlib.md5(usedforsecurity=False)
    for array in (*sets[0], *sets[1]):
        digest.update(array.numpy().tobytes())
    return _with_mean(*sets, num_classes, official=False, checksums={GENERATED: digest.hexdigest()})


def windows_at(images: Tensor, top: Tensor, left: Tensor, *, size: Sequence[int]) -> Tensor:
    """Return the window of ``size`` (height, width) at (top, left) of each image, of shape (B, C, height, width)."""
    windows = images.unfold(2, size[0], 1).unfold(3, size[1], 1)  # a view (B, C, top, left, height, width)
    return windows[torch.arange(len(images), device=images.device), :, top, left]
