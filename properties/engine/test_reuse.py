"""The second evaluation of a branch reuses small results that an operator kept in the first (memcnn/reuse.py)."""

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import memcnn
from memcnn import reuse

computed: list[Tensor] = []
"""The inputs of ``properties::scale_of`` whose scale was computed, not reused."""


@torch.library.custom_op("properties::scale_of", mutates_args=())
def scale_of(x: Tensor) -> Tensor:
    """Return the largest magnitude of x, as an operator that a second evaluation need not compute again."""
    if (result := reuse.take()) is not None:
        return result
    computed.append(x.clone())
    result = x.abs().amax()
    reuse.keep(result)
    return result


@scale_of.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(())


class Scaled(nn.Module):
    """linear(x / largest magnitude), which counts as a constant for the gradient."""

    def __init__(self, size: int = 4):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x / scale_of(x.detach())).tanh()


@pytest.fixture(autouse=True)
def _nothing_computed():
    computed.clear()


def chain(*branches: nn.Module, disable: bool = False) -> nn.Sequential:
    """Return a chain of additive blocks with the branches given, two a block."""
    pairs = zip(branches[::2], branches[1::2], strict=True)
    wrappers = [memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(f, g), disable=disable) for f, g in pairs]
    return nn.Sequential(*wrappers)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


def images(seed: int = 0) -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))


def test_a_step_computes_each_result_once_and_has_the_gradients_of_its_twin():
    branches = [Scaled() for _ in range(4)]
    reversible, stored = chain(*branches), chain(*branches, disable=True)
    expected = gradients(stored, images())
    assert len(computed) == 4
    computed.clear()
    for got, wanted in zip(gradients(reversible, images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert len(computed) == 4
    assert reuse.evaluation.kept is None and reuse.evaluation.remaining is None


def test_each_forward_pass_keeps_its_own_results():
    """Two forward passes, then two backward passes in the other order."""
    model = chain(Scaled(), Scaled())
    inputs = [images(seed) * (1 + 9 * seed) for seed in range(2)]
    expected = [gradients(model, x) for x in inputs]
    leaves = [x.clone().requires_grad_() for x in inputs]
    losses = [model(x).square().sum() for x in leaves]
    computed.clear()
    for loss, leaf, wanted in [*zip(losses, leaves, expected, strict=True)][::-1]:
        for got, one in zip(torch.autograd.grad(loss, [leaf, *model.parameters()]), wanted, strict=True):
            assert torch.equal(got, one)
    assert computed == []


def test_passes_of_a_retained_graph_reuse_the_results_even_if_one_pass_writes_to_them():
    """Compiled code may overwrite what an operator returns, so each pass has copies of its own."""

    class Spoils(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            scale = scale_of(x.detach())
            y = self.linear(x / scale.clone()).tanh()
            scale.zero_()
            return y

    torch.manual_seed(0)
    model = chain(Spoils(), Spoils())
    x = images().requires_grad_()
    loss = model(x).square().sum()
    first, second, third = (
        torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=retain) for retain in (True, True, False)
    )
    assert len(computed) == 2
    for got in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_a_hook_that_computes_results_of_its_own_cannot_mix_them_up():
    """The second evaluation does not call this hook again, so nothing is reused there."""
    branches = [Scaled() for _ in range(2)]
    expected = gradients(chain(*branches), images())
    for branch in branches:
        branch.register_forward_pre_hook(lambda module, inputs: scale_of(torch.full((2,), 99.0)) and None)
    for got, wanted in zip(gradients(chain(*branches), images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_blocks_within_a_branch_keep_their_results_to_themselves():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = chain(Scaled(2), Scaled(2)), Scaled(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x))

    torch.manual_seed(0)
    branches = [Outer() for _ in range(2)]
    for branch in branches:
        branch.stored = chain(*[m for m in branch.inner.modules() if isinstance(m, Scaled)], disable=True)
    expected = gradients(chain(*branches, disable=True), images())
    computed.clear()
    for got, wanted in zip(gradients(chain(*branches), images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    # once forward for each of the 6, and once more within each of the two second evaluations for the 2 inner ones
    assert len(computed) == 10


@pytest.mark.parametrize("calls", [(2, 1), (1, 2)])
def test_other_calls_in_the_second_evaluation_raise_or_are_computed(calls):
    """A result that is left over raises an error. A call without a result computes it."""

    class Uneven(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            again = reuse.evaluation.remaining is not None
            for _ in range(calls[again] - 1):
                scale_of(x.detach())
            return super().forward(x)

    torch.manual_seed(0)
    branches = [Uneven(), Uneven()]
    if calls == (2, 1):
        with pytest.raises(RuntimeError, match="2 results to reuse then, 1 now"):
            gradients(chain(*branches), images())
        return
    expected = gradients(chain(*branches, disable=True), images())
    for got, wanted in zip(gradients(chain(*branches), images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_branch_may_write_to_the_result():
    """The engine keeps a copy of the result."""

    class Writes(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            scale = scale_of(x.detach())
            y = x / scale.clone()
            scale.zero_()
            return self.linear(y).tanh()

    branches = [Writes(), Writes()]
    expected = gradients(chain(*branches, disable=True), images())
    for got, wanted in zip(gradients(chain(*branches), images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_outside_of_blocks_and_without_gradients_nothing_is_kept():
    branch = Scaled(8)
    branch(images())
    checkpoint(branch, images().requires_grad_(), use_reentrant=False).sum().backward()
    with torch.no_grad():
        chain(Scaled(), Scaled())(images())
    assert len(computed) == 5
    assert reuse.take() is None and not reuse.is_first()


def test_a_module_of_ones_own_and_exact_mode_reuse_as_well():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = Scaled()

        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, 1)
            return torch.cat([a + self.branch(b), b], 1)

        def inverse(self, y: Tensor) -> Tensor:
            a, b = y.chunk(2, 1)
            return torch.cat([a - self.branch(b), b], 1)

    own = Own()
    expected = gradients(own, images())
    computed.clear()
    for got, wanted in zip(gradients(memcnn.InvertibleModuleWrapper(own), images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert len(computed) == 2  # the forward pass, and the inverse; the second forward evaluation reuses
    computed.clear()
    exact = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Scaled(), Scaled(), exact=True))
    gradients(exact, images())
    assert len(computed) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_branches_reuse_with_the_code_of_the_first_evaluation():
    torch._dynamo.reset()
    torch.manual_seed(0)
    branches = [Scaled() for _ in range(4)]
    expected = gradients(chain(*branches, disable=True), images())
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        compiled.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for branch in branches:
        branch.compile(backend=backend)
    computed.clear()
    for got, wanted in zip(gradients(chain(*branches), images()), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert len(computed) == 4
    assert len(compiled) == 1


def test_threads_do_not_see_each_others_results():
    found = []
    reuse.evaluation.kept = []
    try:
        thread = threading.Thread(target=lambda: found.append((reuse.is_first(), reuse.take())))
        thread.start()
        thread.join()
    finally:
        reuse.evaluation.kept = None
    assert found == [(False, None)]
