"""Small data sets in the format of CIFAR's files, and the augmentation of a single image."""

import hashlib
import pickle

import torch

from memcnn._torchvision import torchvision


def write_fake(folder, source, *, spoil=None):
    """Write a small data set in the layout of torchvision's ``source``, and return the MD5 sum of each file.

    Args:
        folder: the folder of the data set.
        source: a data set class of torchvision.
        spoil: name of a file to damage; None for none.
    """
    base = folder / source.base_folder
    base.mkdir(parents=True)
    sums = {}
    for name, _ in [*source.train_list, *source.test_list]:
        count = 4
        pixels = torch.randint(
            256, (count, 3072), generator=torch.Generator().manual_seed(len(sums)), dtype=torch.uint8
        )
        labels = [i % 10 for i in range(count)]
        content = pickle.dumps({"data": pixels.numpy(), "labels": labels, "fine_labels": labels})
        (base / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    content = pickle.dumps({source.meta["key"]: list("abcdefghij")})
    (base / source.meta["filename"]).write_bytes(content)
    sums[source.meta["filename"]] = hashlib.md5(content).hexdigest()
    if spoil:
        (base / spoil).write_bytes(b"spoilt")
    return sums


def one_image(pixels: torch.Tensor, mean: torch.Tensor, *, pad: int, top: int, left: int, flip: bool) -> torch.Tensor:
    """Augment one uint8 image (3, 32, 32) as the recipe says, with torchvision's transforms."""
    transforms = torchvision.transforms.functional
    image = transforms.to_tensor(pixels.permute(1, 2, 0).numpy()) - mean
    image = transforms.crop(transforms.pad(image, [pad]), top, left, 32, 32)
    return transforms.hflip(image) if flip else image
