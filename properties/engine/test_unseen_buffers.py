"""Buffers, modules and parameters that change without PyTorch's version counter are replayed, or raise an error."""

import pytest
import torch
from torch import Tensor, nn

from memcnn.engine.checksum import fingerprint, has_fingerprint
from properties.support.blocks import refused, rows
from properties.support.scaled import PROGRAMS, Scaled, chain
from properties.support.twin import assert_like_twin, block, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


class Averaged(Scaled):
    """Keeps an exponential moving average, like the codes of a VQ-VAE."""

    def __init__(self, size: int = 3):
        super().__init__()
        self.register_buffer("average", torch.ones(size))


class ByData(Averaged):
    def scale(self, x):
        self.average.data.mul_(0.5).add_(x.detach().abs().mean(), alpha=0.5)
        return self.average[:3].clone()


class ByNumpy(Averaged):
    def scale(self, x):
        self.average.numpy()[:] *= 0.5
        return self.average[:3].clone()


class ByDetachedStorage(Averaged):
    def scale(self, x):
        torch.tensor([], dtype=x.dtype, device=x.device).set_(self.average.untyped_storage(), 0, (3,)).mul_(0.5)
        return self.average[:3].clone()


class ByAssignment(Averaged):
    def scale(self, x):
        self.average = self.average * 0.5
        return self.average[:3]


class Codebook(Scaled):
    """Assigns a new parameter at every step."""

    def __init__(self):
        super().__init__()
        self.average = nn.Parameter(torch.ones(3), requires_grad=False)

    def scale(self, x):
        self.average = nn.Parameter(self.average * 0.5, requires_grad=False)
        return self.average


@PROGRAMS
@pytest.mark.parametrize("size", [3, 2**13], ids=["small", "large"])
@pytest.mark.parametrize("branch", [ByData, ByNumpy, ByDetachedStorage, ByAssignment, Codebook])
def test_a_buffer_that_forward_changes_unseen_moves_once_and_is_replayed(branch, program, size):
    if torch.get_default_device().type == "cuda" and branch is ByNumpy:
        pytest.skip("NumPy has no tensors on a GPU")
    assert_like_twin(chain(branch if branch is Codebook else lambda: branch(size)), program, rows())


class Masked(Averaged):
    def scale(self, x):
        return self.average[:3]


@pytest.mark.parametrize("size", [3, 2**13], ids=["small", "large"])
@pytest.mark.parametrize("change", [lambda b: b.data.mul_(2), lambda b: b.numpy().__imul__(2)], ids=["data", "NumPy"])
def test_a_buffer_that_changes_unseen_between_forward_and_backward_is_noticed(change, size):
    if torch.get_default_device().type == "cuda":
        pytest.skip("on a GPU the value of the forward pass is put back for the recomputation")
    module = block(lambda: Masked(size))
    loss = weighted_sum(module(rows()))
    change(module._fn.Fm.average)
    with refused(
        RuntimeError,
        "the buffer 'average'",
        "modified between forward and backward in a way that PyTorch does not count (.data",
    ):
        loss.backward()


@pytest.mark.parametrize("name", ["linear", "added"])
def test_a_module_that_is_exchanged_or_added_between_forward_and_backward_is_noticed(name):
    module = block(Masked)
    loss = weighted_sum(module(rows()))
    setattr(module._fn.Gm, name, nn.Linear(3, 3, dtype=torch.float64))
    with refused(RuntimeError, "a module within Masked was exchanged, added or removed between forward and backward"):
        loss.backward()


def test_a_parameter_that_is_removed_before_backward_is_put_back_for_the_recomputation():
    class Weighted(Scaled):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def scale(self, x):
            return 1 if self.weight is None else self.weight

    def program(module: nn.Module, x: Tensor) -> Tensor:
        y, weight = module(x), module._fn.Fm.weight
        module._fn.Fm.weight = None
        weighted_sum(y).backward()
        assert module._fn.Fm.weight is None
        module._fn.Fm.weight = weight
        return y

    assert_like_twin(block(Weighted), program, rows())


DTYPES = (
    *(torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_changed_entry_of_any_dtype_changes_the_fingerprint(dtype):
    x = torch.arange(8).to(dtype)
    assert has_fingerprint(x)
    for i in range(8):
        y = x.clone()
        y[i] = not y[i]
        assert not torch.equal(fingerprint(x), fingerprint(y))
