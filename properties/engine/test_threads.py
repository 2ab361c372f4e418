"""Two steps at once, in two threads."""

import itertools
import random
import sys
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn import ReversibleSequential
from memcnn.testing.tolerances import relative_error, tolerance
from properties.devices import rng_state
from properties.support.blocks import Notes
from properties.support.twin import block, images, plain_twin, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class LongDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = F.dropout(layer(x).tanh(), 0.5)
        return x


@pytest.mark.parametrize("shared", [False, True], ids=["two modules", "one module"])
def test_two_threads_differentiate_at_once(shared):
    models = [nn.Sequential(*(block(LongDropout) for _ in range(4))) for _ in range(2)]
    if shared:
        models[1] = models[0]
    twins = [plain_twin(models[0])] * 2 if shared else [plain_twin(model) for model in models]

    def losses(modules: list[nn.Module]) -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [weighted_sum(module(images(32, 16, seed=i))) for i, module in enumerate(modules)]

    def gradients(modules: list[nn.Module]) -> list[Tensor]:
        results: list[object] = [None, None]
        start = threading.Barrier(2)

        def differentiate(i: int, loss: Tensor) -> None:
            start.wait()
            try:
                results[i] = torch.autograd.grad(loss, list(modules[i].parameters()))
            except RuntimeError as error:
                results[i] = error

        threads = [threading.Thread(target=differentiate, args=pair) for pair in enumerate(losses(modules))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    wanted = gradients(twins)
    for _ in range(3):
        generator = rng_state()
        for got, expected in zip(gradients(models), wanted, strict=True):
            assert isinstance(got, tuple), got
            for g, w in zip(got, expected, strict=True):
                assert relative_error(g, w) < tolerance(torch.float64, depth=4)
        assert torch.equal(rng_state(), generator)


class Drawing(nn.Module):
    """Multiplies by random numbers, drawn in several parts, and records those of every evaluation."""

    def __init__(self, draw: Callable[[], Tensor]):
        super().__init__()
        self.draw, self.drawn = draw, Notes()

    def forward(self, x: Tensor) -> Tensor:
        numbers = []
        for _ in range(8):
            numbers.append(self.draw())
            x = (x * numbers[-1]).sin()
        self.drawn.append(torch.stack(numbers))
        return x


def torchs() -> Tensor:
    return torch.rand((), dtype=torch.float64, device="cpu")


def pythons() -> Tensor:
    return torch.tensor(random.random(), dtype=torch.float64, device="cpu")


@pytest.fixture
def frequent_switches():
    """Let threads take turns after every few operations."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("draw", [torchs, pythons])
def test_two_threads_train_a_model_each_with_random_numbers(frequent_switches, draw):
    models = [ReversibleSequential(*(block(lambda: Drawing(draw)) for _ in range(3))) for _ in range(2)]
    errors = []

    def train(model: nn.Module) -> None:
        try:
            for step in range(40):
                weighted_sum(model(images(8, 6, seed=step))).backward()
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=[model]) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for part in (part for model in models for part in model.modules() if isinstance(part, Drawing)):
        for forward, recomputed in zip(part.drawn[::2], part.drawn[1::2], strict=True):
            assert torch.equal(forward, recomputed)


@pytest.mark.parametrize("draw", [torchs, pythons])
@pytest.mark.parametrize("evaluation", [1, 2], ids=["forward pass", "recomputation"])
def test_another_thread_that_draws_outside_of_blocks_is_noticed(draw, evaluation):
    calls = []

    def disturbed() -> Tensor:
        calls.append(None)
        if len(calls) == 8 * evaluation - 4:
            thread = threading.Thread(target=draw)
            thread.start()
            thread.join()
        return draw()

    module = block(nn.Identity)
    module._fn.Fm = Drawing(disturbed)
    loss = weighted_sum(module(images(8, 6)))
    with pytest.raises(RuntimeError, match="Drawing drew other random numbers from .* another thread drew from it"):
        loss.backward()


def test_a_thread_waits_with_its_branch_while_another_rebuilds_one():
    """If it did not wait, its random numbers would come from the generator state that the recomputation sets."""
    inside, waited = threading.Event(), threading.Event()
    entered = []

    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.append(waited.is_set())
            return x.sin()

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = itertools.count(1)  # a number or a list would be set back

        def forward(self, x: Tensor) -> Tensor:
            if next(self.calls) == 2:
                inside.set()
                thread.join(0.2)
                waited.set()
            return x.sin()

    def forward_of_second() -> None:
        inside.wait()
        block(Second)(images(8, 6))

    thread = threading.Thread(target=forward_of_second)
    loss = weighted_sum(block(First)(images(8, 6)))
    thread.start()
    loss.backward()
    thread.join()
    assert entered == [True, True]
