"""CIFAR-10 and CIFAR-100 on the training device: loading, checksums, and batched augmentation.

The whole set lives on the device as uint8. A batch is gathered, scaled, mean-subtracted, padded, cropped and flipped
there. What an epoch does with the images (their order, crops and flips) is a function of (seed, epoch) alone, the same
on every device, so that a resumed run sees what an uninterrupted one would have seen.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memcnn import archives
from memcnn.archives import DATASETS, NUM_CLASSES

GENERATED = "generated"


@dataclass(frozen=True)
class Data:
    """A training and a test set; images uint8 (N, 3, 32, 32), labels int64 (N,), mean float32 (3, 32, 32).

    mean: per-pixel mean of the training images, scaled to 0..1.
    official: every file has the MD5 published for it; checksums: MD5 by file name.
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
        """Return "official", "generated" or "unofficial", as ``record.run_name`` takes it."""
        if self.official:
            return "official"
        return GENERATED if GENERATED in self.checksums else "unofficial"

    def to(self, device: torch.device | str) -> "Data":
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class EpochPlan:
    """What one epoch does, by position in it: order (N,) and crop corners top, left (N,) int64, flip (N,) bool."""

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor

    def to(self, device: torch.device | str) -> "EpochPlan":
        return EpochPlan(*(value.to(device) for value in vars(self).values()))

    def part(self, start: int, stop: int) -> "EpochPlan":
        """What happens to the images from `start` to before `stop`, as views."""
        return EpochPlan(*(value[start:stop] for value in vars(self).values()))

    def clone(self) -> "EpochPlan":
        return EpochPlan(*(value.clone() for value in vars(self).values()))

    def copy_(self, other: "EpochPlan") -> None:
        """Take the values of another plan for as many images, in place."""
        for mine, value in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(value)


def load(dataset: str, data: str | Path | None = None, *, download: bool = True, unofficial: bool = False) -> Data:
    """The data set `dataset` ("cifar10" or "cifar100") on the CPU.

    data: the folder that holds torchvision's cifar-10-batches-py/ or cifar-100-python/, or the word "generated" for
    made-up images of the same shape. By default the environment's MEMCNN_DATA, else ./data. unofficial: files that are
    not the official ones will do; the result's `official` says which they are.
    Raises archives.DataNotFound when the official files are missing and cannot be downloaded, and archives.BadData for
    a file that does not hold what it should.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    where = whereabouts(data)
    if where == GENERATED:
        return generate(NUM_CLASSES[dataset])
    folder = Path(where)
    checksums, official = archives.find(dataset, folder, download=download, unofficial=unofficial)
    train, test = (archives.read(dataset, folder, train=train) for train in (True, False))
    return _data(*train, *test, NUM_CLASSES[dataset], official, checksums)


def whereabouts(data: str | Path | None) -> str:
    """The folder that `load` looks in, or the word "generated"."""
    return str(data or os.environ.get("MEMCNN_DATA") or "data")


def _data(train_images, train_labels, test_images, test_labels, num_classes, official, checksums) -> Data:
    sums = [part.sum(0, dtype=torch.float32) for part in train_images.split(10_000)]  # whole numbers below 2^24: exact
    total = torch.stack(sums).sum(0, dtype=torch.float64)
    return Data(
        train_images=train_images,
        train_labels=torch.as_tensor(train_labels, dtype=torch.int64),
        test_images=test_images,
        test_labels=torch.as_tensor(test_labels, dtype=torch.int64),
        mean=(total / len(train_images) / 255).float(),
        num_classes=num_classes,
        official=official,
        checksums=checksums,
    )


def generate(num_classes: int, *, train: int = 5_000, test: int = 1_000, seed: int = 0) -> Data:
    """Made-up images in CIFAR's shape, the same for the same arguments: never official, but learnable.

    A class is a smooth colour pattern (a 4 x 4 grid blown up to 40 x 40); an image is a 32 x 32 part of its class's
    pattern, from anywhere in it, at a random contrast, under noise.
    """
    generator = torch.Generator().manual_seed(seed)
    grid = torch.randn(num_classes, 3, 4, 4, generator=generator)
    patterns = F.interpolate(grid, size=(40, 40), mode="bilinear", align_corners=False)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(num_classes, (count,), generator=generator)
        top, left = torch.randint(9, (2, count), generator=generator)
        contrast = 20 + 30 * torch.rand(count, 1, 1, 1, generator=generator)
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        images = contrast * _crop(patterns[labels], top, left) + 25 * noise + 128
        return images.round_().clamp_(0, 255).to(torch.uint8), labels

    arrays = [*draw(train), *draw(test)]
    digest = hashlib.md5(usedforsecurity=False)
    for array in arrays:
        digest.update(array.numpy().tobytes())
    return _data(*arrays, num_classes, False, {GENERATED: digest.hexdigest()})


def epoch_plan(seed: int, epoch: int, images: int, *, pad: int, flip: bool) -> EpochPlan:
    """The order of `images` training images in an epoch, and what happens to each: a function of the arguments.

    Crop corners are uniform on 0 .. 2 * pad. The bits come from a counter keyed by (seed, epoch); only the raw stream
    is used, which numpy keeps the same in all versions.
    """
    bits = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(4 * images).reshape(4, images)
    corners = (bits[1:3] % np.uint64(2 * pad + 1)).astype(np.int64)
    flips = (bits[3] >> np.uint64(63)).astype(bool) & flip
    return EpochPlan(
        order=torch.from_numpy(np.argsort(bits[0], kind="stable")),
        top=torch.from_numpy(corners[0]),
        left=torch.from_numpy(corners[1]),
        flip=torch.from_numpy(flips),
    )


def normalise(images: Tensor, mean: Tensor) -> Tensor:
    """uint8 (B, 3, 32, 32) to float32, scaled to 0..1, less the training set's per-pixel mean."""
    return images.float().div_(255).sub_(mean)


def augment(images: Tensor, *, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad normalised images (B, C, H, W) with zeros, cut H x W from (top, left) of each, mirror where `flip` says so.

    Zero is the mean image, since the mean is subtracted before. top, left: (B,) int64 in 0 .. 2 * pad; flip: (B,) bool.
    """
    cropped = _crop(F.pad(images, [pad] * 4), top, left, size=images.shape[-2:])
    return torch.where(flip[:, None, None, None], cropped.flip(3), cropped)


def _crop(images: Tensor, top: Tensor, left: Tensor, size: tuple[int, int] = (32, 32)) -> Tensor:
    windows = images.unfold(2, size[0], 1).unfold(3, size[1], 1)  # a view (B, C, top, left, height, width)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def batch(data: Data, plan: EpochPlan, *, pad: int) -> tuple[Tensor, Tensor]:
    """The training images of a plan, or of a part of one, augmented: float32 (B, 3, 32, 32), and their labels (B,)."""
    images = normalise(data.train_images[plan.order], data.mean)
    return augment(images, pad=pad, top=plan.top, left=plan.left, flip=plan.flip), data.train_labels[plan.order]


def train_batch(data: Data, plan: EpochPlan, index: int, *, batch_size: int, pad: int) -> tuple[Tensor, Tensor]:
    """Batch `index` of an epoch."""
    return batch(data, plan.part(index * batch_size, (index + 1) * batch_size), pad=pad)
