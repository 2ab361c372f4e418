"""Faults of disks (full or read-only) and of checkpoints (damaged or replaced)."""

import errno
import io
import os
import pickle
import subprocess
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import torch

from memcnn.training import checkpoint
from properties.faults.ground import NAME, Ground, small_disk
from properties.support.runs import tiny

FALLS_BACK = "Going on from the one before, checkpoint.previous.pt."


def full_disk(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a disk that is full from the start, from some file on, or from some instant on"""
    stopped = 0
    for _ in range(tries):
        with small_disk(ground.folder / f"disk-{ground.made}", mebibytes=4) as is_disk:
            runs, job = ground.new_runs(ground.folder / f"disk-{ground.made}"), {}
            if not is_disk:
                job["largest_file_bytes"] = rng.randrange(30_000)
            elif rng.random() < 0.5:
                _fill(runs.parent, room=rng.randrange(80_000))
            process = ground.start(runs, **job)
            if is_disk and rng.random() < 0.5:
                time.sleep(rng.uniform(0, ground.seconds))
                _fill(runs.parent, room=0)
            status = ground.wait(process)
            assert status in (0, 1), ground.said(runs)
            if status:
                stopped += 1
                said, why = ground.said(runs), os.strerror(errno.ENOSPC if is_disk else errno.EFBIG)
                assert f"cannot write in {runs}" in said and why in said, said
                assert "Traceback" not in said and not list(runs.glob("*/*.tmp"))
                ground.check_nothing_lost(runs)
            for filler in runs.parent.glob("filler-*"):
                filler.unlink()
            ground.finishes(runs)
        how = "a disk of its own" if is_disk else "a limit to the size of files, since no disk may be mounted here"
        yield f"on {how}; {stopped} runs stopped, the others had room enough"


def _fill(folder: Path, *, room: int) -> None:
    """Fill the disk until about ``room`` bytes are free."""
    name = folder / f"filler-{len(list(folder.iterdir()))}"
    with suppress(OSError), open(name, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(name, max(0, name.stat().st_size - room))


def read_only_folder(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a results folder that may not be written to: empty, or with a run half done"""
    for _ in range(tries):
        with small_disk(ground.folder / f"disk-{ground.made}", mebibytes=4) as is_disk:
            runs = ground.new_runs(ground.folder / f"disk-{ground.made}")
            runs.mkdir()
            if rng.random() < 0.5:
                ground.partial(rng, runs)
            with read_only(runs, is_disk):
                ground.refuses(runs, status=1, says=f"cannot write in {runs}")
            ground.finishes(runs)
            with read_only(runs, is_disk):
                ground.refuses(runs, status=0, says="is already complete")
        yield "nothing is changed; where it is allowed again, the same command goes on"


@contextmanager
def read_only(runs: Path, is_disk: bool) -> Iterator[None]:
    """Make ``runs`` read-only: remount its disk, or remove the permission from its folders."""
    if is_disk:
        subprocess.run(["mount", "-o", "remount,ro", str(runs.parent)], check=True)
        yield
        subprocess.run(["mount", "-o", "remount,rw", str(runs.parent)], check=True)
        return
    folders = [runs, *(path for path in runs.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield
    for folder in folders:
        folder.chmod(0o755)


def damaged(ground: Ground, rng: Random, tries: int, damage: Callable[[bytes], bytes]) -> Iterator[str]:
    for _ in range(tries):
        runs = ground.partial(rng)
        path = runs / NAME / "checkpoint.pt"
        content = damage(path.read_bytes())
        path.write_bytes(content)
        ground.finishes(runs, says=FALLS_BACK)
        assert (runs / NAME / checkpoint.DAMAGED).read_bytes() == content
        yield "the one before is taken, and it is said; the damaged file is kept aside"


def truncated_checkpoint(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a checkpoint cut short at a random byte"""
    return damaged(ground, rng, tries, lambda content: content[: rng.randrange(len(content))])


def flipped_checkpoint(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a checkpoint with one to three bits flipped anywhere"""

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        for place in rng.sample(range(8 * len(content)), rng.randint(1, 3)):
            changed[place // 8] ^= 1 << place % 8
        return bytes(changed)

    return damaged(ground, rng, tries, flip)


def foreign_checkpoint(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """something else in a checkpoint's place: weights, an archive, a pickle, an image, text, nothing"""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    contents = [
        saved(tiny().state_dict()), saved({"identity": {}, "state": {}}), checkpoint.seal(saved([1, 2])),
        checkpoint.seal(saved({"identity": 3, "state": {}})), archive.getvalue(), checkpoint.seal(archive.getvalue()),
        pickle.dumps({"state": {}}), b"\x89PNG\r\n\x1a\n", b"text", b"",
    ]  # fmt: skip
    return damaged(ground, rng, tries, lambda _: rng.choice(contents))


def two_damaged_checkpoints(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """both checkpoints damaged"""
    for _ in range(tries):
        runs = ground.partial(rng)
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            path = runs / NAME / name
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        says = "checkpoint.pt cannot be read ... checkpoint.previous.pt cannot be read ... --fresh"
        ground.refuses(runs, status=2, says=says)
        ground.finishes(runs, "--fresh")
        yield "refused, both are named; --fresh begins anew and keeps them"


def hostile_checkpoint(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """a checkpoint, under a right seal, that would run code when unpickled"""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(harm),)

    for _ in range(tries):
        harm = ground.folder / f"harm-{ground.made}"
        hostile = checkpoint.seal(saved({"identity": {}, "state": {"model": Harm()}}))
        yield from damaged(ground, rng, 1, lambda _, hostile=hostile: hostile)
        assert not harm.exists()


def another_runs_checkpoint(ground: Ground, rng: Random, tries: int) -> Iterator[str]:
    """the checkpoint of another recipe, seed, engine or model"""
    others = {
        "recipe is": ["--weight-decay", "0.5"], "seed is 7 there, 0 here": ["--seed", "7"],
        "engine is False there, True here": ["--disable"], "model is 'revnet38' there, 'resnet32' here": [],
    }  # fmt: skip
    for _ in range(tries):
        says, words = rng.choice(list(others.items()))
        runs, other = ground.partial(rng), ground.new_runs()
        assert ground.run(other, *words) == 0, ground.said(other)
        (folder,) = other.iterdir()
        identity, state = checkpoint.read(folder / "checkpoint.pt")
        if not words:
            identity = replace(identity, model="revnet38")
        checkpoint.save(runs / NAME, identity, state)
        ground.refuses(runs, status=2, says=f"checkpoint.pt belongs to another run: {says}")
        yield "refused, with what differs"


def saved(values: object) -> bytes:
    """Return the bytes that ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


FAULTS = (
    full_disk, read_only_folder, truncated_checkpoint, flipped_checkpoint, foreign_checkpoint, two_damaged_checkpoints,
    another_runs_checkpoint, hostile_checkpoint,
)  # fmt: skip
