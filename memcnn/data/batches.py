"""The batches of an epoch: which images, and how each is padded, cropped and flipped."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from memcnn.data.images import Data, windows_at


@dataclass(frozen=True)
class EpochPlan:
    """The random choices of one epoch for N images, by position in the epoch.

    Attributes:
        order: indices of the images, int64 of shape (N,).
        top: first row of each crop, int64 of shape (N,).
        left: first column of each crop, int64 of shape (N,).
        flip: which images are mirrored, bool of shape (N,).
    """

    order: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor

    def to(self, device: torch.device | str) -> "EpochPlan":
        """Return the plan on another device."""
        return EpochPlan(*(value.to(device) for value in vars(self).values()))

    def part(self, start: int, stop: int) -> "EpochPlan":
        """Return views of the positions from ``start`` up to, but not including, ``stop``."""
        return EpochPlan(*(value[start:stop] for value in vars(self).values()))

    def clone(self) -> "EpochPlan":
        """Return a plan with copies of the tensors."""
        return EpochPlan(*(value.clone() for value in vars(self).values()))

    def copy_(self, other: "EpochPlan") -> None:
        """Copy the values of another plan of the same length into this one, in place."""
        for mine, value in zip(vars(self).values(), vars(other).values(), strict=True):
            mine.copy_(value)


def epoch_plan(seed: int, epoch: int, images: int, *, pad: int, flip: bool) -> EpochPlan:
    """Return the plan of an epoch. Equal arguments give equal plans, on every machine.

    The bits come from a counter keyed by (seed, epoch). Only the raw stream is used, which numpy keeps the same in all
    versions.

    Args:
        seed: the run's seed.
        epoch: the number of the epoch, from 0.
        images: the number of training images.
        pad: pixels of padding; crop corners are uniform on 0 .. 2 * pad.
        flip: mirror each image with probability 1/2.
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
    """Return images as the network takes them: float32, scaled to 0..1, minus the training set's per-pixel mean.

    Every device computes the same bits, because 255 is a tensor. CUDA does not divide by a Python number but multiplies
    by 1/255, which rounds differently for half of the pixel values.

    Args:
        images: uint8 of shape (B, 3, 32, 32).
        mean: float32 of shape (3, 32, 32), on the scale 0..1.
    """
    largest = torch.full((), 255.0, device=images.device)
    return images.float().div_(largest).sub_(mean)


def augment(images: Tensor, *, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Pad normalised images with zeros, crop each back to its size, and mirror some.

    Zero is the mean image, because the mean has been subtracted.

    Args:
        images: float32 of shape (B, C, H, W).
        pad: pixels of padding on each side.
        top: first row of each crop, int64 of shape (B,), in 0 .. 2 * pad.
        left: first column of each crop, likewise.
        flip: which images to mirror, bool of shape (B,).
    """
    cropped = windows_at(F.pad(images, [pad] * 4), top, left, size=images.shape[-2:])
    return torch.where(flip[:, None, None, None], cropped.flip(3), cropped)


def batch(data: Data, plan: EpochPlan, *, pad: int) -> tuple[Tensor, Tensor]:
    """Return the augmented training images of a plan, or of a part of one, and their labels.

    Args:
        data: the data set.
        plan: the B images and how to augment them, on the device of ``data``.
        pad: pixels of padding on each side, as for ``epoch_plan``.

    Returns:
        Images, float32 of shape (B, 3, 32, 32), and labels, int64 of shape (B,).
    """
    images = normalise(data.train_images[plan.order], data.mean)
    return augment(images, pad=pad, top=plan.top, left=plan.left, flip=plan.flip), data.train_labels[plan.order]


def train_batch(data: Data, plan: EpochPlan, index: int, *, batch_size: int, pad: int) -> tuple[Tensor, Tensor]:
    """Return the augmented images and the labels of batch ``index``, counted from 0, of an epoch; see ``batch``."""
    return batch(data, plan.part(index * batch_size, (index + 1) * batch_size), pad=pad)
