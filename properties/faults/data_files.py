"""Faults of data files: truncated, changed, replaced and hostile files."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import reports
from memcnn.data import files
from memcnn.training import record
from properties.faults.sandbox import Sandbox
from properties.support.cifar_files import write_fake

SOURCE = files.DATASETS["cifar10"]
FILES = [name for name, _ in [*SOURCE.train_list, *SOURCE.test_list]]
ALL = ("--test-images", "all")


def spoilt(sandbox: Sandbox, rng: Random, spoil: Callable[[bytes], bytes]) -> tuple[Path, Path, dict]:
    """Write a data set with one damaged file.

    Returns:
        The folder of the data set, the damaged file, and options of a job that accept the other files.
    """
    folder = sandbox.new_runs()
    official = write_fake(folder, SOURCE)
    path = folder / SOURCE.base_folder / rng.choice(FILES)
    path.write_bytes(spoil(path.read_bytes()))
    return folder, path, {"official": official}


def used_if_unofficial(sandbox: Sandbox, rng: Random, tries: int, spoil: Callable[[bytes], bytes]) -> Iterator[str]:
    """Assert that data with a damaged file are refused, and with ``--unofficial-data`` used or refused as no images."""
    trained = 0
    for _ in range(tries):
        folder, path, job = spoilt(sandbox, rng, spoil)
        runs, words = sandbox.new_runs(), (*ALL, "--data", str(folder))
        sandbox.check_refusal(runs, *words, status=1, message=f"{path.name} has MD5 ... --unofficial-data", **job)
        assert not list(runs.iterdir())
        status = sandbox.run(runs, *words, "--unofficial-data", **job)
        if status == 0:
            trained += 1
            assert "(not the official files)" in sandbox.output(runs)
            [(_run, found)], [] = record.load_all(runs)
            assert not found.data["official"] and found.data["checksums"][path.name] != job["official"][path.name]
            [row] = reports.build(runs, runs / "none").runs.itertuples()
            assert not row.full and row.data == "not the official files" and "not the official files" in row.why
        else:
            output = sandbox.output(runs)
            assert status == 1 and f"{path} is not a batch of CIFAR images" in output and "Traceback" not in output, (
                output
            )
            assert not list(runs.iterdir())
        yield (
            f"refused; the file is named. With --unofficial-data, {trained} runs trained and are marked in record and "
            f"table; {tries - trained} were refused, because the file was no batch of images"
        )


def truncated_data(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a data file cut short at a random byte"""
    return used_if_unofficial(sandbox, rng, tries, lambda content: content[: rng.randrange(len(content))])


def flipped_data(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a data file with one bit flipped anywhere"""

    def flip(content: bytes) -> bytes:
        place = rng.randrange(8 * len(content))
        return content[: place // 8] + bytes([content[place // 8] ^ (1 << place % 8)]) + content[place // 8 + 1 :]

    return used_if_unofficial(sandbox, rng, tries, flip)


def other_images(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """other images and labels in a data file, so that its checksum differs"""

    def change(content: bytes) -> bytes:
        batch = pickle.loads(content)
        batch["data"][:, rng.randrange(3072)] ^= 1
        batch["labels"] = [rng.randrange(10) for _ in batch["labels"]]
        return pickle.dumps(batch)

    return used_if_unofficial(sandbox, rng, tries, change)


def hostile_data(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a data file that would run code when unpickled"""
    for _ in range(tries):
        harm = sandbox.folder / f"harm-{sandbox.folders_made}"

        class Harm:
            def __reduce__(self, harm=harm):
                return os.mkdir, (str(harm),)

        folder, path, job = spoilt(sandbox, rng, lambda _, Harm=Harm: pickle.dumps({"data": Harm(), "labels": [1]}))
        runs, words = sandbox.new_runs(), (*ALL, "--data", str(folder))
        sandbox.check_refusal(runs, *words, status=1, message=f"{path.name} has MD5", **job)
        message = f"{path} is not a batch of CIFAR images"
        sandbox.check_refusal(runs, *words, "--unofficial-data", status=1, message=message, **job)
        assert not harm.exists() and not list(runs.iterdir())
        yield "refused, also with --unofficial-data; no code is run"


FAULTS = (truncated_data, flipped_data, other_images, hostile_data)
