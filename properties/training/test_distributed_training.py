"""A run in several processes computes what one process computes on the same shares; all stop and resume together."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import memcnn
from memcnn.models.resnet import MODELS
from memcnn.testing.tolerances import relative_error, tolerance
from memcnn.training import distributed
from memcnn.training.recipe import SMOKE, override
from memcnn.training.record import load, run_name
from memcnn.training.stopping import Stop
from memcnn.training.trainer import BadArgument
from properties.support import commands
from properties.support.executions import small_revnet
from properties.support.runs import (
    NAME,
    RECIPE,
    assert_same_run,
    checkpoint_of,
    curve_of,
    run,
    stopped_after,
    tiny,
    tiny_training,
)

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs PyTorch's gloo: install a build with it")
RANKS = 2
TWO = f"{NAME}-p{RANKS}"  # the folder of the tiny run of two processes


class Shares(nn.Module):
    """In training, normalise each rank's share of a batch separately; keep the running statistics of rank 0."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.inner(images)
        first, *others = images.chunk(RANKS)
        logits = [self.inner(first)]
        kept = [buffer.clone() for buffer in self.inner.buffers()]
        logits += [self.inner(share) for share in others]
        for buffer, value in zip(self.inner.buffers(), kept, strict=True):
            buffer.data.copy_(value)
        return torch.cat(logits)


class WithoutBatchNorm(nn.Module):
    """A network whose result does not depend on how a batch is shared."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 4, stride=4), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


NETWORKS = {
    "BatchNorm": lambda num_classes, disable: tiny(),
    "RevNet": lambda num_classes, disable: small_revnet(),
    "no BatchNorm": lambda num_classes, disable: WithoutBatchNorm(),
}


@contextmanager
def network(make):
    """Replace every run by a tiny run of the network that ``make`` makes, within this context."""
    with tiny_training() as patch:
        patch.setitem(MODELS, "resnet32", make)
        yield patch


def join(rank: int, store: Path) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timeout)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_runs):
    """Return a function that runs job(*arguments) on every rank, and returns the results by rank."""
    store = tmp_path_factory.mktemp("ranks") / "store"
    server = commands.server()
    pools = [ProcessPoolExecutor(1, server, initializer=join, initargs=(rank, store)) for rank in range(RANKS)]
    yield lambda job, *arguments: [
        future.result(timeout=120) for future in [pool.submit(job, *arguments) for pool in pools]
    ]
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def trained(folder: Path, name: str, **options):
    with network(NETWORKS[name]):
        return run(folder, **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_two_processes_train_as_one_does_on_the_same_shares(tmp_path, ranks, name):
    records = ranks(trained, tmp_path / "two", name)
    make = NETWORKS[name]
    with network(make if name == "no BatchNorm" else lambda num_classes, disable: Shares(make(num_classes, disable))):
        record = run(tmp_path / "one")
    assert [r.status for r in records] == ["complete"] * RANKS
    assert records[0].device["count"] == RANKS and record.device["count"] == 1
    assert load(tmp_path / "two" / TWO) == records[0]

    limit = tolerance(torch.float32, depth=RECIPE.iterations)
    state, expected = (checkpoint_of(tmp_path / folder) for folder in (f"two/{TWO}", f"one/{NAME}"))
    for (key, got), wanted in zip(state["model"].items(), expected["model"].values(), strict=True):
        assert relative_error(got, wanted) <= limit, key
    for got, wanted in zip(curve_of(tmp_path / "two" / TWO), curve_of(tmp_path / "one" / NAME), strict=True):
        for column in ("iteration", "train_loss", "test_loss"):
            assert float(got[column]) == pytest.approx(float(wanted[column]), rel=limit)
        assert got["test_accuracy"] == wanted["test_accuracy"]


def trained_in_parts(folder: Path, name: str, stop_after: int):
    """Train until rank 0 wants to stop, resume until rank 1 wants to stop, and resume to the end."""
    for rank in range(RANKS):
        with network(NETWORKS[name]) as patch:
            questions = iter(range(stop_after))

            def reason(self, *, needed_seconds, rank=rank, questions=questions):
                return "interrupted" if next(questions, None) is None and dist.get_rank() == rank else None

            patch.setattr(Stop, "reason", reason)
            record = run(folder)
            assert (record.status, record.reason) == ("partial", "interrupted")
    with network(NETWORKS[name]):
        return run(folder)


def test_a_stop_of_one_is_a_stop_of_all_and_resuming_gives_the_same_bits(tmp_path, ranks):
    ranks(trained, tmp_path / "whole", "BatchNorm")
    records = ranks(trained_in_parts, tmp_path / "parts", "BatchNorm", 3)
    assert [(r.status, r.interruptions) for r in records] == [("complete", 2)] * RANKS
    assert_same_run(tmp_path / "parts" / TWO, tmp_path / "whole" / TWO)


def failed(folder: Path):
    """Train a network whose loss is NaN on rank 1 at iteration 5."""

    class Overflowing(WithoutBatchNorm):
        def forward(self, images: Tensor) -> Tensor:
            late = self.training and dist.get_rank() == 1 and self.seen == 4
            self.seen += self.training
            return super().forward(images) * (torch.inf if late else 1)

        seen = 0

    with network(lambda num_classes, disable: Overflowing()):
        return run(folder)


def test_a_loss_that_is_nan_on_one_rank_fails_the_run_on_all(tmp_path, ranks):
    records = ranks(failed, tmp_path)
    assert [r.status for r in records] == ["failed"] * RANKS
    assert {r.reason for r in records} == {"loss is nan at iteration 5"}


def refused(folder: Path, **options) -> str:
    with network(NETWORKS["BatchNorm"]), pytest.raises(Exception) as caught:  # noqa: PT011 - returned to the test
        run(folder, **options)
    return f"{caught.type.__name__}: {caught.value}"


def refused_batch(folder: Path) -> str:
    return refused(folder, recipe=override(RECIPE, batch_size=5))


def refused_checkpoint(folder: Path) -> str:
    return refused(folder)


def test_a_refusal_of_the_first_process_ends_all_processes(tmp_path, ranks):
    for text in ranks(refused_batch, tmp_path):
        assert text.startswith(f"{BadArgument.__name__}: batch_size: got 5, which 2 processes cannot share equally")
    with stopped_after(3):
        run(tmp_path)
    (tmp_path / NAME).rename(tmp_path / TWO)
    for text in ranks(refused_checkpoint, tmp_path):
        assert "images that BatchNorm sees is None there, 4 here" in text


def loaded_in_turn(folder: Path, failing: int | None) -> tuple[int, bool] | str:
    world = distributed._world()

    def load() -> tuple[int, bool]:
        if world.rank == failing:
            raise FileNotFoundError(f"no files for process {failing}")
        if world.is_first:
            time.sleep(0.2)
            (folder / "downloaded").touch()
        return world.rank, (folder / "downloaded").exists()

    try:
        return world.in_turn(load)
    except FileNotFoundError as error:
        return str(error)


def test_the_first_process_loads_the_data_first_and_a_failure_of_one_fails_all(tmp_path, ranks):
    assert ranks(loaded_in_turn, tmp_path, None) == [(0, True), (1, True)]
    for failing in range(RANKS):
        assert ranks(loaded_in_turn, tmp_path, failing) == [f"no files for process {failing}"] * RANKS


ROOT = Path(memcnn.__file__).resolve().parent.parent
LONG = override(SMOKE, iterations=4000, evaluate_every=2, test_images=10)
WORDS = """resnet32 cifar10 --recipe smoke --iterations 4000 --evaluate-every 2 --test-images 10 --data generated
    --device cpu --threads 1""".split()


def resumed(folder: Path):
    return run(folder, recipe=LONG, device=None, budget_seconds=0)


def test_under_torchrun_a_killed_process_ends_the_run_which_then_resumes(tmp_path, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
    process = subprocess.Popen(
        [*command, "-m", "memcnn.train", *WORDS, "--runs", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT,
    )  # fmt: skip
    record = tmp_path / run_name("resnet32", "cifar10", LONG, 0, data="generated", processes=RANKS) / "record.json"
    try:
        while not record.exists():  # the first evaluation
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.kill(next(pid for pid in children_of(process.pid) if b"RANK=1" in environment_of(pid)), signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1
    assert "process 0 of 2: another process has ended" in output, output
    assert "Run the same command again to resume from the last checkpoint" in output
    done = load(record)
    assert done.status == "partial" and done.iterations >= 2
    for again in ranks(resumed, tmp_path):
        assert (again.iterations, again.interruptions) == (done.iterations, 1)


def children_of(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def environment_of(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
