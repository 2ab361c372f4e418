"""Faults of data files: truncated, changed, replaced and hostile files."""

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import reports
from memcnn.data import files
from memcnn.training import record
from properties.faults.ground import Ground
from properties.support.cifar_files import write_fake

SOURCE = files.DATASETS["cifar10"]
FILES = [name for name, _ in [*SOURCE.train_list, *SOURCE.test_list]]
ALL = ("--test-images", "all")


def spoilt(ground: Ground, rng: Random, spoil: Callable[[bytes], bytes]) -> tuple[Path, Path, dict]:
    """Write a data set with one damaged file. Return its folder, that file, and options that accept the rest."""
    folder = ground.new_runs()
    official = write_fake(folder, SOURCE)
    path = folder / SOURCE.base_folder / rng.choice(FILES)
    path.write_bytes(spoil(path.read_bytes()))
    return folder, path, {"official": official}


def refused_then_unofficial(ground: Ground, rng: Random, tries: int, spoil: Callable[[bytes], bytes]) -> Iterator[str]:
    trained = 0
    for _ in range(tries):
        folder, path, job = spoilt(ground, rng, spoil)
        runs, words = ground.new_runs(), (*ALL, "--data", str(folder))
        ground.refuses(runs, *words, status=1, says=f"{path.name} has MD5 ... --unofficial-data", **job)
        assert not list(runs.iterdir())
        status = ground.run(runs, *words, "--unofficial-data", **job)
        if status == 0:
            trained += 1
            assert "(not the official files)" in ground.said(runs)
            [(_run, found)], [] = record.load_all(runs)
            assert not found.data["official"] and found.data["checksums"][path.name] != job["official"][path.name]
            [row] = reports.build(runs, runs / "none").runs.itertuples()
            assert not row.full and row.data == "not the official files" and "not the official files" in row.why
        else:
            said = ground.said(runs)
            assert status == 1 and f"{path} is not a batch of CIFAR images" in said and "Traceback" not in said, said
            assert not list(runs.iterdir())
        yield (
            f"refused, the file is named. With --unofficial-data {trained} trained, recorded and marked in the table; "
            f"{tries - trained} were no images, and refused"
        )


def truncated_data(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a data file cut short at a random byte"""
    return refused_then_unofficial(ground, rng, tries, lambda content: content[: rng.randrange(len(content))])


def flipped_data(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a data file with one bit flipped anywhere"""

    def flip(content: bytes) -> bytes:
        place = rng.randrange(8 * len(content))
        return content[: place // 8] + bytes([content[place // 8] ^ (1 << place % 8)]) + content[place // 8 + 1 :]

    return refused_then_unofficial(ground, rng, tries, flip)


def other_images(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """other images and labels in a data file, of a wrong checksum"""

    def change(content: bytes) -> bytes:
        batch = pickle.loads(content)
        batch["data"][:, rng.randrange(3072)] ^= 1
        batch["labels"] = [rng.randrange(10) for _ in batch["labels"]]
        return pickle.dumps(batch)

    return refused_then_unofficial(ground, rng, tries, change)


def hostile_data(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a data file that would run code when unpickled"""
    for _ in range(tries):
        harm = ground.folder / f"harm-{ground.made}"

        class Harm:
            def __reduce__(self, harm=harm):
                return os.mkdir, (str(harm),)

        folder, path, job = spoilt(ground, rng, lambda _, Harm=Harm: pickle.dumps({"data": Harm(), "labels": [1]}))
        runs, words = ground.new_runs(), (*ALL, "--data", str(folder))
        ground.refuses(runs, *words, status=1, says=f"{path.name} has MD5", **job)
        says = f"{path} is not a batch of CIFAR images"
        ground.refuses(runs, *words, "--unofficial-data", status=1, says=says, **job)
        assert not harm.exists() and not list(runs.iterdir())
        yield "refused, also with --unofficial-data; nothing is run"


FAULTS = (truncated_data, flipped_data, other_images, hostile_data)
