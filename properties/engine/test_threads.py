"""Two steps at once, in two threads."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memcnn.testing.tolerances import relative_error, tolerance
from properties.devices import rng_state
from properties.support.twin import (
    block,
    images,
    plain_twin,
    weighted_sum,
)

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
