"""``budget_bytes``: a step never needs more, stores as many blocks as fit, and gives the same results."""

import copy
import pickle
import re
from collections import Counter

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, AffineAdapterNaive, AffineCoupling, ReversibleSequential
from memcnn.memory import TensorMeter, measure_step_memory, predict_step_memory
from memcnn.models.budget import ELEMENT, Price, price_of
from properties.support.twin import assert_like_twin, backward, data

WIDTH, DEPTH = 4, 3


class Branch(nn.Module):
    """Linear, normalisation, dropout, tanh, linear, with a hidden layer of ``hidden`` values."""

    def __init__(self, hidden: int = 8, p: float = 0.2):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.Dropout(p),
            nn.Tanh(),
            nn.Linear(hidden, WIDTH),
        )

    def forward(self, x, *, mask=None):
        return self.net(x if mask is None else x * mask)


def chain(budget_bytes=None, *, depth: int = DEPTH, kind=AdditiveCoupling, **options) -> ReversibleSequential:
    torch.manual_seed(0)
    couplings = [kind(Branch(), Branch()) for _ in range(depth)]
    return ReversibleSequential(*couplings, budget_bytes=budget_bytes, **options)


def affine(budget_bytes=None) -> ReversibleSequential:
    return chain(budget_bytes, depth=2, kind=lambda f, g: AffineCoupling(f, g, adapter=AffineAdapterNaive))


def step_of(module, x, direction="forward", **kwargs):
    def step():
        results = getattr(module, direction)(x, **kwargs)
        torch.autograd.backward(results, gradients if isinstance(results, tuple) else gradients[:1])

    gradients = torch.ones_like(x), torch.ones(len(x))
    return step


def measured(module, x, *arguments, **kwargs) -> int:
    """Return the peak of the first four steps of a new module. The drift watch samples the fourth."""
    x = x.detach().requires_grad_(x.requires_grad)
    step = step_of(module, x, *arguments, **kwargs)
    return max(measure_step_memory(module, step).activation_bytes for _ in range(4))


X = torch.randn(16, 2 * WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
LEAST, MOST = measured(chain(), X), measured(chain(keep_every=1), X)


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_the_peak_is_the_predicted_one_and_within_the_budget(share):
    budget = LEAST + int(share * (MOST - LEAST))
    module = chain(budget)
    peak_bytes = measured(module, X)
    (plan,) = module.budget.plans.values()
    assert peak_bytes == plan.peak_bytes <= budget
    if share in (0, 1):
        assert len(plan.stored) == share * DEPTH
    else:
        one_more = min(set(range(DEPTH)) - plan.stored, key=lambda i: measured(stored(plan.stored | {i}), X))
        assert measured(stored(plan.stored | {one_more}), X) > budget, "no further block fits"


def stored(positions) -> ReversibleSequential:
    """Return the chain that stores exactly these blocks."""
    module = chain()
    for i in positions:
        module[i].disable = True
    return module


@pytest.mark.parametrize("share", [0.3, 1])
def test_gradients_buffers_and_random_numbers_are_those_of_the_twin(share):
    module = chain(int(2 * (LEAST + share * (MOST - LEAST)))).double()
    assert_like_twin(module, backward, data(16, 2 * WIDTH), depth=2 * DEPTH)
    assert module.budget.plans


def test_the_most_expensive_blocks_are_stored_first_and_run_once():
    def mixed(budget_bytes=None):
        torch.manual_seed(0)
        deep = [nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(2))) for _ in range(2)]
        cheap = [nn.Sequential(nn.Tanh(), nn.Tanh()) for _ in range(2)]
        branches = [deep[0], cheap[0], deep[1], cheap[1]]
        return ReversibleSequential(
            *(AdditiveCoupling(f, copy.deepcopy(f)) for f in branches), budget_bytes=budget_bytes
        )

    x = torch.randn(8, 64, requires_grad=True)
    with_expensive = mixed()
    for i in (0, 2):
        with_expensive[i].disable = True
    module, calls = mixed(measured(with_expensive, x)), Counter()
    step_of(module, x)()
    (plan,) = module.budget.plans.values()
    assert plan.stored == {0, 2}
    for i, part in enumerate(module):
        forward = part._fn.Fm[0].forward
        part._fn.Fm[0].forward = lambda x, forward=forward, i=i: (calls.update([i]), forward(x))[1]
    step_of(module, x)()
    assert calls == {0: 1, 1: 2, 2: 1, 3: 2}


def test_a_price_counts_products_and_written_elements_but_no_views():
    x = torch.randn(3, 2 * WIDTH, requires_grad=True)
    half = x.numel() // 2
    elementwise, _ = price_of(AdditiveCoupling(nn.Tanh(), nn.Tanh()), x, {})
    written = 5 * half + x.numel()  # a copy of the second half, twice tanh and sum; the concatenation
    assert elementwise == Price(ELEMENT * written, 2 * half * 4)
    linear = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)]
    products, results = price_of(AdditiveCoupling(*linear), x, {})
    assert products.cost == elementwise.cost + 2 * 2 * half * WIDTH and results[0].shape == x.shape
    assert products.stored_bytes <= 2 * half * 4, "weights are no activations, nor are views of them"
    assert products.cost_per_byte == products.cost / products.stored_bytes


def test_below_the_minimum_is_an_error_that_names_it():
    message = (
        rf"budget_bytes={LEAST - 1:,} is too small for an input of shape \(16, 8\): .* a step needs {LEAST:,} bytes"
    )
    with pytest.raises(ValueError, match=message):
        chain(LEAST - 1)(X)
    chain(LEAST)(X)
    with torch.no_grad():
        chain(1)(X)


def test_each_size_and_mode_has_its_own_plan():
    module = chain(LEAST + (MOST - LEAST) // 2, depth=2)
    with torch.no_grad():
        module(X)
    assert not module.budget.plans
    for x in (X, X[:8], X):
        module(x)
    assert len(module.budget.plans) == 2
    few, many = sorted(len(plan.stored) for plan in module.budget.plans.values())
    assert few < many
    assert not module.eval()(X).isnan().any() and len(module.budget.plans) == 3


@pytest.mark.parametrize("direction", ["inverse", "forward_log_det", "inverse_log_det"])
def test_other_directions_have_plans_too(direction):
    least = measured(affine().eval(), X, direction)
    module = affine(least + 3000).eval()
    peak_bytes = measured(module, X, direction)
    ((key, plan),) = module.budget.plans.items()
    assert key[0] == direction and plan.stored and peak_bytes == plan.peak_bytes <= least + 3000


class Recurrent(nn.Module):
    """An LSTM, whose workspace only oneDNN knows, over the samples as one sequence."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH)

    def forward(self, x):
        return self.lstm(x.unsqueeze(1))[0].squeeze(1)


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize(("branch", "exact"), [(Branch, True), (Recurrent, None), (Recurrent, True)])
def test_exact_chains_and_recurrent_branches_are_planned_to_the_byte(branch, exact, share):
    def make(**options):
        return ReversibleSequential(*(AdditiveCoupling(branch()) for _ in range(4)), exact=exact, **options)

    least, most = measured(make(), X), measured(make(keep_every=1), X)
    budget = least + int(share * (most - least))
    module = make(budget_bytes=budget)
    peak_bytes = measured(module, X)
    (plan,) = module.budget.plans.values()
    assert peak_bytes == plan.peak_bytes <= budget < most and bool(plan.stored) == bool(share)


def test_a_step_with_a_shared_branch_that_is_watched_more_often_stays_within_the_budget():
    branch = Branch()

    def make(**options):
        return ReversibleSequential(*(AdditiveCoupling(branch, branch) for _ in range(3)), **options)

    with pytest.raises(ValueError, match="raise the budget to that") as error:
        make(budget_bytes=1)(X)
    least = int(re.search(r"a step needs ([\d,]+) bytes", str(error.value))[1].replace(",", ""))
    module = make(budget_bytes=least)
    assert max(measured(module, X) for _ in range(3)) <= least


def test_each_step_is_predicted_once(monkeypatch):
    """Predictions take most of the time of planning."""
    forward, calls = ReversibleSequential.forward, []
    monkeypatch.setattr(ReversibleSequential, "forward", lambda self, x: (calls.append(0), forward(self, x))[1])
    chain(LEAST)(X)
    assert len(calls) == 3, "the step itself, with no block stored, and with the last block stored"


def test_masks_and_autocast_are_part_of_the_prediction():
    mask = torch.ones(WIDTH)
    module = chain(MOST, depth=2)
    assert measured(module, X, mask=mask) == next(iter(module.budget.plans.values())).peak_bytes
    with torch.autocast("cpu", torch.bfloat16):
        assert measured(module, X) <= MOST
    assert len(module.budget.plans) == 2
    plain, half = module.budget.plans.values()
    assert plain.peak_bytes != half.peak_bytes


def test_the_prediction_has_no_side_effects():
    module, x = chain(LEAST), X.detach().requires_grad_()
    state, packed = torch.get_rng_state(), []
    gradient = torch.ones_like(x)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t)
    with TensorMeter() as meter, hooks:
        y = module.eval()(x)
        y.backward(gradient)
    assert meter.peak_bytes <= LEAST and torch.equal(torch.get_rng_state(), state)
    assert not packed or all(type(t) is not torch._subclasses.FakeTensor for t in packed)


def test_a_chain_with_a_budget_can_be_predicted():
    def loss(y, _):
        return y.square().mean()

    predicted = predict_step_memory(
        lambda: chain(MOST, depth=2), lambda: (torch.ones(16, 8), None), loss=loss, optimizer=None
    )
    without = predict_step_memory(lambda: chain(depth=2), lambda: (torch.ones(16, 8), None), loss=loss, optimizer=None)
    assert without.activation_bytes < predicted.activation_bytes


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_have_the_budget(copied):
    module = chain(LEAST, depth=1).eval()
    module(X)
    other = copied(module)
    assert torch.equal(other(X), module(X)) and other.budget.limit_bytes == LEAST


class Reading(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_chain_that_cannot_be_planned_is_refused():
    with pytest.raises(RuntimeError, match="budget_bytes needs a prediction of the step.*use keep_every"):
        ReversibleSequential(AdditiveCoupling(Reading()), budget_bytes=10**6)(X)
    inner = chain(10**6, depth=1)
    outer = ReversibleSequential(AdditiveCoupling(inner))
    with pytest.raises(RuntimeError, match="runs within a branch of another reversible block"):
        outer(torch.randn(16, 16, requires_grad=True))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True])
def test_a_budget_that_is_no_number_of_bytes_is_refused(wrong):
    with pytest.raises(ValueError, match="budget_bytes must be None or a whole number of bytes"):
        chain(wrong)


def test_keep_every_and_budget_bytes_exclude_each_other():
    with pytest.raises(ValueError, match="got keep_every=2 and budget_bytes=10.*leave one out"):
        chain(10, keep_every=2)
