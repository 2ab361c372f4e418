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
from properties.faults.sandbox import NAME, Sandbox, small_disk
from properties.support.runs import tiny

FALLS_BACK = "Resuming from the previous checkpoint, checkpoint.previous.pt."


def full_disk(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a disk that is full from the start, from some file on, or from a random instant on"""
    stopped = 0
    for _ in range(tries):
        with small_disk(sandbox.folder / f"disk-{sandbox.folders_made}", mebibytes=4) as is_disk:
            runs, job = sandbox.new_runs(sandbox.folder / f"disk-{sandbox.folders_made}"), {}
            if not is_disk:
                job["largest_file_bytes"] = rng.randrange(30_000)
            elif rng.random() < 0.5:
                _fill(runs.parent, room=rng.randrange(80_000))
            process = sandbox.start(runs, **job)
            if is_disk and rng.random() < 0.5:
                time.sleep(rng.uniform(0, sandbox.seconds))
                _fill(runs.parent, room=0)
            status = sandbox.wait(process)
            assert status in (0, 1), sandbox.output(runs)
            if status:
                stopped += 1
                output, why = sandbox.output(runs), os.strerror(errno.ENOSPC if is_disk else errno.EFBIG)
                assert f"cannot write in {runs}" in output and why in output, output
                assert "Traceback" not in output and not list(runs.glob("*/*.tmp"))
                sandbox.check_nothing_lost(runs)
            for filler in runs.parent.glob("filler-*"):
                filler.unlink()
            sandbox.check_completes(runs)
        how = "on a small disk" if is_disk else "with a limit to the size of files, since no disk may be mounted here"
        yield f"{how}; {stopped} runs stopped, the others had room enough"


def _fill(folder: Path, *, room: int) -> None:
    """Fill the disk until about ``room`` bytes are free."""
    name = folder / f"filler-{len(list(folder.iterdir()))}"
    with suppress(OSError), open(name, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(name, max(0, name.stat().st_size - room))


def read_only_folder(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a results folder that may not be written to: empty, or with a run half done"""
    for _ in range(tries):
        with small_disk(sandbox.folder / f"disk-{sandbox.folders_made}", mebibytes=4) as is_disk:
            runs = sandbox.new_runs(sandbox.folder / f"disk-{sandbox.folders_made}")
            runs.mkdir()
            if rng.random() < 0.5:
                sandbox.interrupted_run(rng, runs)
            with read_only(runs, is_disk):
                sandbox.check_refusal(runs, status=1, message=f"cannot write in {runs}")
            sandbox.check_completes(runs)
            with read_only(runs, is_disk):
                sandbox.check_refusal(runs, status=0, message="is already complete")
        yield "nothing is changed; once writing is allowed again, the same command starts or resumes the run"


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


def damaged(sandbox: Sandbox, rng: Random, tries: int, damage: Callable[[bytes], bytes]) -> Iterator[str]:
    """Replace the checkpoint of interrupted runs by ``damage`` of its bytes; assert that the run is resumed."""
    for _ in range(tries):
        runs = sandbox.interrupted_run(rng)
        path = runs / NAME / "checkpoint.pt"
        content = damage(path.read_bytes())
        path.write_bytes(content)
        sandbox.check_completes(runs, message=FALLS_BACK)
        assert (runs / NAME / checkpoint.DAMAGED).read_bytes() == content
        yield "the run resumes from the previous checkpoint, and says so; the damaged file is kept"


def truncated_checkpoint(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a checkpoint cut short at a random byte"""
    return damaged(sandbox, rng, tries, lambda content: content[: rng.randrange(len(content))])


def flipped_checkpoint(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a checkpoint with one to three bits flipped anywhere"""

    def flip(content: bytes) -> bytes:
        changed = bytearray(content)
        for place in rng.sample(range(8 * len(content)), rng.randint(1, 3)):
            changed[place // 8] ^= 1 << place % 8
        return bytes(changed)

    return damaged(sandbox, rng, tries, flip)


def foreign_checkpoint(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """something else in place of a checkpoint: weights, an archive, a pickle, an image, text, nothing"""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "a")
    contents = [
        saved(tiny().state_dict()), saved({"identity": {}, "state": {}}), checkpoint.seal(saved([1, 2])),
        checkpoint.seal(saved({"identity": 3, "state": {}})), archive.getvalue(), checkpoint.seal(archive.getvalue()),
        pickle.dumps({"state": {}}), b"\x89PNG\r\n\x1a\n", b"text", b"",
    ]  # fmt: skip
    return damaged(sandbox, rng, tries, lambda _: rng.choice(contents))


def two_damaged_checkpoints(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """both checkpoints damaged"""
    for _ in range(tries):
        runs = sandbox.interrupted_run(rng)
        for name in ("checkpoint.pt", "checkpoint.previous.pt"):
            path = runs / NAME / name
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
        message = "checkpoint.pt cannot be read ... checkpoint.previous.pt cannot be read ... --fresh"
        sandbox.check_refusal(runs, status=2, message=message)
        sandbox.check_completes(runs, "--fresh")
        yield "refused; both are named. --fresh begins anew and keeps them"


def hostile_checkpoint(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """a checkpoint with a valid seal that would run code when unpickled"""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(harm),)

    for _ in range(tries):
        harm = sandbox.folder / f"harm-{sandbox.folders_made}"
        hostile = checkpoint.seal(saved({"identity": {}, "state": {"model": Harm()}}))
        yield from damaged(sandbox, rng, 1, lambda _, hostile=hostile: hostile)
        assert not harm.exists()


def another_runs_checkpoint(sandbox: Sandbox, rng: Random, tries: int) -> Iterator[str]:
    """the checkpoint of another recipe, seed, engine or model"""
    others = {
        "recipe is": ["--weight-decay", "0.5"], "seed is 7 there, 0 here": ["--seed", "7"],
        "engine is False there, True here": ["--disable"], "model is 'revnet38' there, 'resnet32' here": [],
    }  # fmt: skip
    for _ in range(tries):
        message, words = rng.choice(list(others.items()))
        runs, other = sandbox.interrupted_run(rng), sandbox.new_runs()
        assert sandbox.run(other, *words) == 0, sandbox.output(other)
        (folder,) = other.iterdir()
        identity, state = checkpoint.read(folder / "checkpoint.pt")
        if not words:
            identity = replace(identity, model="revnet38")
        checkpoint.save(runs / NAME, identity, state)
        sandbox.check_refusal(runs, status=2, message=f"checkpoint.pt belongs to another run: {message}")
        yield "refused; the differences are named"


def saved(values: object) -> bytes:
    """Return the bytes that ``torch.save`` writes."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getvalue()


FAULTS = (
    full_disk, read_only_folder, truncated_checkpoint, flipped_checkpoint, foreign_checkpoint, two_damaged_checkpoints,
    another_runs_checkpoint, hostile_checkpoint,
)  # fmt: skip
