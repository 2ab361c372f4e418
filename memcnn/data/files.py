"""The files of CIFAR-10 and CIFAR-100: find them, compare their checksums, download them, read their arrays.

The files are pickles. Our unpickler accepts only plain numeric arrays, even in files with the right checksums, so that
no file can run code.
"""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memcnn._torchvision import torchvision
from memcnn.datasets import NUM_CLASSES

DATASETS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
"""torchvision's classes, which know the names and checksums of the files."""


class DataNotFound(RuntimeError):
    """Files are missing, or are not the official ones. The message names the folder that was searched, and a fix."""


class BadData(RuntimeError):
    """A file does not contain a batch of CIFAR images. The message names the file."""


def find(dataset: str, folder: Path, *, download: bool = True, unofficial: bool = False) -> tuple[dict[str, str], bool]:
    """Find the files of a data set under ``folder`` and download them if they are missing.

    The download starts only if no file with a wrong checksum is present, so that it overwrites nothing.

    Args:
        dataset: ``"cifar10"`` or ``"cifar100"``.
        folder: the folder that contains torchvision's ``cifar-10-batches-py/`` or ``cifar-100-python/``.
        download: download missing files.
        unofficial: accept files whose MD5 differs from the published one.

    Returns:
        The MD5 of each file by its name, and whether all files are the official ones.

    Raises:
        DataNotFound: a file is missing, or its MD5 is wrong and ``unofficial`` is False.
    """
    source = DATASETS[dataset]
    checksums, missing, wrong = verify_files(source, folder)
    outcome = "Nothing was downloaded."
    if missing and not wrong and download:
        created = not folder.exists()
        try:
            torchvision.datasets.utils.download_and_extract_archive(
                source.url, folder, filename=source.filename, md5=source.tgz_md5
            )
        except (OSError, RuntimeError) as error:
            if created and folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
            outcome = f"The download failed: {error}"
        else:
            checksums, missing, wrong = verify_files(source, folder)
    if missing or (wrong and not unofficial):
        raise DataNotFound(_not_found(source, folder, missing, wrong, outcome))
    return checksums, not wrong


def verify_files(source: type[Any], folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Return the MD5 of each file of a torchvision CIFAR class, messages about missing files and about wrong files."""
    if not (folder / source.base_folder).is_dir():
        return {}, ["there is no such folder"], []
    official = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    checksums, missing, wrong = {}, [], []
    for name, wanted in official.items():
        path = folder / source.base_folder / name
        if not path.is_file():
            missing.append(f"{name} is missing")
            continue
        with open(path, "rb") as file:
            digest = hashlib.md5(usedforsecurity=False)
            while block := file.read(1 << 20):
                digest.update(block)
        checksums[name] = digest.hexdigest()
        if checksums[name] != wanted:
            wrong.append(f"{name} has MD5 {checksums[name]}, official is {wanted}")
    return checksums, missing, wrong


def read(dataset: str, folder: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """Read the training set or the test set.

    Returns:
        Images, uint8 of shape (N, 3, 32, 32), and labels, int64 of shape (N,).

    Raises:
        BadData: a file does not contain a batch of CIFAR images.
    """
    source = DATASETS[dataset]
    names = [name for name, _ in (source.train_list if train else source.test_list)]
    parts = [_read_batch(folder / source.base_folder / name, NUM_CLASSES[dataset]) for name in names]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _read_batch(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Return images and labels of one file, as ``read`` does."""
    content = path.read_bytes()
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        pixels, labels = batch["data"].uint8_values(), batch["labels" if "labels" in batch else "fine_labels"]
        if pixels.shape != (len(labels), 3072):
            raise ValueError(f"{len(labels)} labels and images of shape {pixels.shape}, wanted (..., 3072)")
        if not labels or not all(type(label) is int and 0 <= label < classes for label in labels):
            raise ValueError(f"its labels are not whole numbers below {classes}")
    except Exception as error:  # a damaged pickle can raise any exception
        raise BadData(f"{path} is not a batch of CIFAR images ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.tensor(labels)


class _ArraysOnly(pickle.Unpickler):
    """Unpickler that accepts only the names in a pickled array, and replaces each by a class that runs no code."""

    def find_class(self, module: str, name: str) -> object:
        known = {
            "numpy.core.multiarray._reconstruct": _Array,
            "numpy.core.numeric._frombuffer": _Array.from_buffer,
            "numpy.dtype": _Type,
            "numpy.ndarray": None,
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, from Python 3 in protocol 2
        }
        wanted = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # its name from numpy 2 on
        if wanted not in known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no plain array needs")
        return known[wanted]


class _Type:
    """Replaces a pickled ``numpy.dtype``."""

    def __init__(self, code: str, *arguments: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        """Ignore the byte order and alignment: single bytes have none."""


class _Array:
    """Replaces a pickled ``numpy.ndarray``."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran, self.content = state

    @classmethod
    def from_buffer(cls, content: object, kind: _Type, shape: tuple, order: str) -> "_Array":
        array = cls()
        array.__setstate__((1, shape, kind, order == "F", content))
        return array

    def uint8_values(self) -> np.ndarray:
        """Return the array.

        Raises:
            ValueError: its dtype is not uint8.
        """
        if self.type.code != "u1":
            raise ValueError(f"got an array of dtype {self.type.code}, wanted u1 (uint8)")
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        return np.frombuffer(content, np.uint8).reshape(self.shape, order="F" if self.fortran else "C")


def _not_found(source: type[Any], folder: Path, missing: list[str], wrong: list[str], outcome: str) -> str:
    """Return the message of ``DataNotFound``."""
    where = (folder / source.base_folder).resolve()
    lines = [f"{source.__name__} was looked for in {where}: {'; '.join([*missing, *wrong])}."]
    if not wrong:
        lines.append(outcome)
    elif not missing:
        lines.append("To train on these files as they are, use --unofficial-data; record and table will say so.")
    lines += [
        f"To get the official ones, download {source.url} (MD5 {source.tgz_md5}) and unpack it.",
        f"Then point at the folder that holds {source.base_folder}/: --data FOLDER, or MEMCNN_DATA=FOLDER in the "
        "environment.",
        "To try the code without them, use --data generated (generated images; the accuracy means nothing).",
    ]
    return "\n".join(lines)
