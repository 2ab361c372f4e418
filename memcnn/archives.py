"""CIFAR's files: whether they are all there, whether they are the official ones, and the arrays in them.

The files are pickles. They are read by an unpickler that knows plain numeric arrays and nothing else, whatever their
checksums: no file can run code.
"""

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memcnn._torchvision import torchvision
from memcnn.training.record import NUM_CLASSES

DATASETS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


class DataNotFound(RuntimeError):
    """The official files are neither there nor to be had; the message says where they were looked for."""


class BadData(RuntimeError):
    """A file of the data set does not hold what it should; the message names it."""


def find(dataset: str, folder: Path, *, download: bool = True, unofficial: bool = False) -> tuple[dict[str, str], bool]:
    """MD5 by file name of the data set's files under `folder`, and whether all are the official ones.

    Files that are missing are downloaded when none of the others is a wrong one: nothing that is there is written over.
    Raises DataNotFound when a file is missing, and unless `unofficial`, when one has not the published MD5.
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


def verify_files(source: type, folder: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """MD5 of each file of a torchvision CIFAR class under `folder`; sentences on missing files, and on wrong ones."""
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
    """The training or test set: images uint8 (N, 3, 32, 32), labels int64 (N,); BadData for a file that is no batch."""
    source = DATASETS[dataset]
    names = [name for name, _ in (source.train_list if train else source.test_list)]
    parts = [_read_batch(folder / source.base_folder / name, NUM_CLASSES[dataset]) for name in names]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _read_batch(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    content = path.read_bytes()
    try:
        batch = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
        pixels, labels = batch["data"].bytes(), batch["labels" if "labels" in batch else "fine_labels"]
        if pixels.shape != (len(labels), 3072):
            raise ValueError(f"{len(labels)} labels and images of shape {pixels.shape}, wanted (..., 3072)")
        if not labels or not all(type(label) is int and 0 <= label < classes for label in labels):
            raise ValueError(f"its labels are not whole numbers below {classes}")
    except Exception as error:  # a damaged pickle fails in any way there is
        raise BadData(f"{path} is no batch of CIFAR images ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), torch.tensor(labels)


class _ArraysOnly(pickle.Unpickler):
    """Knows the names that a pickled array needs, and puts harmless ones of this file in their place."""

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
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an array")
        return known[wanted]


class _Type:
    """A numpy type as it is pickled."""

    def __init__(self, code: str, *arguments: object) -> None:
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        """Byte order and the like, which bytes have not."""


class _Array:
    """A numpy array as it is pickled."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran, self.content = state

    @classmethod
    def from_buffer(cls, content: object, kind: _Type, shape: tuple, order: str) -> "_Array":
        array = cls()
        array.__setstate__((1, shape, kind, order == "F", content))
        return array

    def bytes(self) -> np.ndarray:
        """The array, which must be one of bytes."""
        if self.type.code != "u1":
            raise ValueError(f"an array of {self.type.code}, wanted u1")
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        return np.frombuffer(content, np.uint8).reshape(self.shape, order="F" if self.fortran else "C")


def _not_found(source: type, folder: Path, missing: list[str], wrong: list[str], outcome: str) -> str:
    where = (folder / source.base_folder).resolve()
    lines = [f"{source.__name__} was looked for in {where}: {'; '.join([*missing, *wrong])}."]
    if not wrong:
        lines.append(outcome)
    elif not missing:
        lines.append("To train on these files as they are, which the record and the table then say: --unofficial-data.")
    lines += [
        f"To get the official ones, download {source.url} (MD5 {source.tgz_md5}) and unpack it.",
        f"Then point at the folder that holds {source.base_folder}/: --data FOLDER, or MEMCNN_DATA=FOLDER in the "
        "environment.",
        "To try things without them: --data generated (made-up images; results mean nothing).",
    ]
    return "\n".join(lines)
