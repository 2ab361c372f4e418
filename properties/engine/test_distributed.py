"""Reversible blocks under DistributedDataParallel and FSDP2 on two processes, and as the replicas of DataParallel."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel, replicate

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support import commands
from properties.support.twin import FLOOR, images, plain_twin

RANKS = 2
DEPTH = 3


class Branch(nn.Module):
    """A branch that keeps (N, 3, H, W), and records each of its evaluations in ``events``."""

    events: ClassVar[list[str]] = []

    def __init__(self, name: str, unused: bool = False):
        super().__init__()
        self.name = name
        self.net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh(), nn.Conv2d(3, 3, 1))
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        self.events.append(f"evaluate {self.name}")
        return self.net(x)


class Network(nn.Module):
    """Convolution, wrapped blocks, mean over the map: (N, 6, H, W) to (N, 6)."""

    def __init__(self, *, unused: bool = False, shared: bool = False, sequence: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(6, 6, 1)
        pairs = [(Branch(f"F{i}", unused), Branch(f"G{i}")) for i in range(DEPTH)]
        if shared:
            pairs[-1] = pairs[0][::-1]
        blocks = [InvertibleModuleWrapper(AdditiveCoupling(F, G)) for F, G in pairs]
        self.blocks = ReversibleSequential(*blocks) if sequence else nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


def network(**options: bool) -> Network:
    torch.manual_seed(0)
    return Network(**options).double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    return images(4, 6, 5, 4, seed=step, requires_grad=False), images(4, 6, seed=100 + step, requires_grad=False)


def loss_of(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().mean()


def this_ranks_part(x: Tensor) -> Tensor:
    return x.chunk(RANKS)[dist.get_rank()]


def local_loss(model: nn.Module, step: int = 0) -> Tensor:
    return loss_of(model, *map(this_ranks_part, batch(step)))


def expected_gradients(steps: int = 1, **options: bool) -> dict[str, Tensor | None]:
    """Return the gradients of one process on the whole batch under ordinary autograd, summed over the steps."""
    twin = plain_twin(network(**options))
    for step in range(steps):
        loss_of(twin, *batch(step)).backward()
    return {name: p.grad for name, p in twin.named_parameters()}


def assert_gradients(model: nn.Module, expected: dict[str, Tensor | None]) -> None:
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    assert largest > 0
    for name, wanted in expected.items():
        got = actual[name]
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        if wanted is None:
            assert got is None or not got.any(), f"{name} is unused, but got a gradient"
        else:
            error = relative_error(got, wanted, least_scale=FLOOR * largest)
            assert error < tolerance(torch.float64, depth=DEPTH), f"{name}: {error:.1e}"


def data_parallel_step(options: dict, ddp: dict) -> None:
    model = network(**options)
    wrapped = DistributedDataParallel(model, **ddp)
    for _ in range(3):  # the buckets are rebuilt, and a static graph is taken for one, after the first
        model.zero_grad()
        local_loss(wrapped).backward()
    assert_gradients(model, expected_gradients(**options))


def accumulated_without_synchronisation() -> None:
    model = network()
    wrapped = DistributedDataParallel(model)
    with wrapped.no_sync():
        local_loss(wrapped, 0).backward()
    local_loss(wrapped, 1).backward()
    assert_gradients(model, expected_gradients(steps=2))


def reduction_begins_before_the_last_recomputation(sequence: bool) -> None:
    model = network(sequence=sequence)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-4)

    def reduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        Branch.events.append("reduce")
        buffer = bucket.buffer().div_(RANKS)
        return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

    wrapped.register_comm_hook(None, reduce)
    for _ in range(2):
        model.zero_grad()
        loss = local_loss(wrapped)
        Branch.events.clear()
        loss.backward()
    events = Branch.events.copy()
    assert_gradients(model, expected_gradients())
    recomputed = [event for event in events if event != "reduce"]
    assert recomputed == [f"evaluate {name}{i}" for i in reversed(range(DEPTH)) for name in "GF"], events
    for i in range(DEPTH - 1):  # the gradients of a block are being reduced before the previous block is recomputed
        assert events[: events.index(f"evaluate G{i}")].count("reduce") >= DEPTH - 1 - i, events


def sharded_step(units: Callable[[Network], list[nn.Module]], sequence: bool, reshard: bool, frozen: str) -> None:
    model = network(sequence=sequence)
    expected = expected_gradients(sequence=sequence)
    for name, p in model.named_parameters():
        if frozen and frozen in name:
            p.requires_grad_(False)
            expected[name] = None
    mesh = init_device_mesh("cpu", (RANKS,))
    for unit in [*units(model), model]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    for _ in range(2):
        model.zero_grad()
        local_loss(model).backward()
    assert_gradients(model, expected)


def branches(model: Network) -> list[nn.Module]:
    return [branch for block in model.blocks for branch in (block._fn.Fm, block._fn.Gm)]


def layers_of_branches(model: Network) -> list[nn.Module]:
    return [layer for branch in branches(model) for layer in branch.net if isinstance(layer, nn.Conv2d)]


def blocks(model: Network) -> list[nn.Module]:
    return list(model.blocks)


def nothing(model: Network) -> list[nn.Module]:
    return []


def as_rank(rank: int, store: str, scenario: Callable, arguments: tuple) -> None:
    """Run in a process of its own."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=30)
    )
    try:
        scenario(*arguments)
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(RANKS, mp_context=commands.server()) as pool:
        yield pool


@pytest.fixture
def on_two_ranks(processes: ProcessPoolExecutor, tmp_path) -> Callable:
    def run(scenario: Callable, *arguments) -> None:
        ranks = [processes.submit(as_rank, rank, str(tmp_path / "store"), scenario, arguments) for rank in range(RANKS)]
        for failure in [rank.exception(timeout=120) for rank in ranks]:
            if failure is not None:
                raise failure

    return run


@pytest.mark.parametrize(
    ("options", "ddp"),
    [
        ({}, {}),
        ({}, {"find_unused_parameters": True}),
        ({"unused": True}, {"find_unused_parameters": True}),
        ({"shared": True}, {}),
        ({"shared": True, "unused": True}, {"find_unused_parameters": True}),
        ({"shared": True}, {"static_graph": True}),
        ({"unused": True}, {"static_graph": True}),
        ({"sequence": True}, {}),
        ({"sequence": True, "shared": True, "unused": True}, {"find_unused_parameters": True}),
        ({}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}),
    ],
    ids=lambda options: " ".join(options) or "default",
)
def test_data_parallel_gradients_are_those_of_one_process_on_the_whole_batch(on_two_ranks, options, ddp):
    on_two_ranks(data_parallel_step, options, ddp)


def test_gradients_gather_without_synchronisation(on_two_ranks):
    on_two_ranks(accumulated_without_synchronisation)


@pytest.mark.parametrize("sequence", [False, True], ids=["wrapped blocks", "sequence"])
def test_data_parallel_reduces_while_blocks_are_recomputed(on_two_ranks, sequence):
    on_two_ranks(reduction_begins_before_the_last_recomputation, sequence)


@pytest.mark.parametrize("frozen", ["", "Fm"])
@pytest.mark.parametrize("reshard", [True, False], ids=["resharded", "kept"])
@pytest.mark.parametrize("sequence", [False, True], ids=["wrapped blocks", "sequence"])
@pytest.mark.parametrize("units", [branches, layers_of_branches, blocks, nothing], ids=lambda units: units.__name__)
def test_fully_sharded_gradients_are_those_of_one_process_on_the_whole_batch(
    on_two_ranks, units, sequence, reshard, frozen
):
    on_two_ranks(sharded_step, units, sequence, reshard, frozen)


def replicas_on_cpu(model: nn.Module, monkeypatch) -> list[nn.Module]:
    """Return replicas as DataParallel makes them: parameters are plain tensors: copies with a graph."""
    internals = sys.modules[replicate.__module__]
    monkeypatch.setattr(internals, "_get_device_index", lambda device, optional: device)
    monkeypatch.setattr(
        internals,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [
            [t.detach().clone() if detach else t.clone() for t in tensors] for _ in devices
        ],
    )
    return replicate(model, list(range(RANKS)))


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"unused": True}, {"sequence": True}], ids=str)
def test_replicas_hand_the_gradients_to_their_model(monkeypatch, options):
    model = network(**options)
    x, target = batch()
    replicas = replicas_on_cpu(model, monkeypatch)
    assert not list(replicas[0].parameters())
    outputs = [replica(part) for replica, part in zip(replicas, x.chunk(RANKS), strict=True)]
    (torch.cat(outputs) - target).square().mean().backward()
    assert_gradients(model, expected_gradients(**options))
