"""Autocast, low-precision and double-precision streams."""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from memcnn import AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.tolerances import tolerance
from properties.support.twin import (
    OnlyInvertible,
    assert_same,
    backward,
    conv_branch,
    images,
    plain_twin,
    run,
    weighted_sum,
)

DEPTH = 4
LOW = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("on_device")


class Linears(nn.Module):
    """Uses one weight twice."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(self.norm(self.first(x)).tanh())


class OwnAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_branch()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.net(x)


KINDS = {
    "wrapped couplings": lambda branch: nn.Sequential(
        *(InvertibleModuleWrapper(AdditiveCoupling(branch(), branch())) for _ in range(DEPTH))
    ),
    "a sequence": lambda branch: ReversibleSequential(*(AdditiveCoupling(branch(), branch()) for _ in range(DEPTH))),
    "modules with forward and inverse": lambda branch: ReversibleSequential(
        *(OnlyInvertible(AdditiveCoupling(branch(), branch())) for _ in range(DEPTH))
    ),
}


def chain(branch=conv_branch, kind: str = "wrapped couplings") -> nn.Module:
    torch.manual_seed(0)
    return KINDS[kind](branch)


def inputs() -> list[Tensor]:
    return [images(dtype=torch.float32)]


def autocasting(dtype: torch.dtype, **options) -> torch.autocast:
    return torch.autocast(torch.get_default_device().type, dtype, **options)


def forward_only(autocast):
    def program(model, x):
        with autocast():
            y = model(x)
        return trained(y)

    return program


def backward_only(autocast):
    def program(model, x):
        y = model(x)
        with autocast():
            return trained(y)

    return program


def both(autocast):
    def program(model, x):
        with autocast():
            return trained(model(x))

    return program


def two_steps_in_one_context(autocast):
    """The second step uses the weights that the first step left in autocast's cache."""

    def program(model, x):
        with autocast():
            trained(model(x))
            return trained(model(x * 2))

    return program


def backward_in_the_context_of_another_forward(autocast):
    def program(model, x):
        with autocast():
            y = model(x)
        with autocast():
            trained(y)
            return trained(model(x * 2))

    return program


def evaluated_before(autocast):
    def program(model, x):
        with autocast():
            with torch.no_grad():
                model(x)
            return trained(model(x))

    return program


def trained(y: Tensor) -> Tensor:
    weighted_sum(y.float()).backward()
    return y.float()


PROGRAMS = [
    forward_only,
    backward_only,
    both,
    two_steps_in_one_context,
    backward_in_the_context_of_another_forward,
    evaluated_before,
]


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("branch", [conv_branch, Linears], ids=["conv", "linear"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_float32_stream_under_autocast_trains_as_the_twin(program, kind, branch, cache):
    """They may differ by one rounding to the low precision, if a rebuilt value rounds to the neighbouring number."""

    def autocast():
        return autocasting(torch.bfloat16, cache_enabled=cache)

    model = chain(branch, kind)
    twin = plain_twin(model)
    limit = tolerance(torch.float32, depth=DEPTH) if program is backward_only else torch.finfo(torch.bfloat16).eps
    actual, expected = (run(m, program(autocast), inputs()) for m in (model, twin))
    assert all(g is not None for g in actual.gradients.values())
    assert_same(actual, expected, limit=limit)


def test_a_branch_may_have_its_own_autocast():
    model = chain(OwnAutocast)
    twin = plain_twin(model)
    assert_same(run(model, backward, inputs()), run(twin, backward, inputs()), limit=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_precise_stream_has_the_twins_gradients(kind, dtype):
    model = chain(kind=kind).to(dtype)
    twin = plain_twin(model)
    x = [images(dtype=dtype)]
    assert_same(run(model, backward, x), run(twin, backward, x), limit=tolerance(dtype, depth=DEPTH))


def low_precision(dtype: torch.dtype, autocast: bool) -> tuple[nn.Module, Tensor, object]:
    """Return a chain, an input in ``dtype``, and the context in which to run it."""
    model = chain(lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1)))
    x = images(4, 8, 6, 6, dtype=torch.float32, requires_grad=False).to(dtype)
    return (model, x, autocasting(dtype)) if autocast else (model.to(dtype), x, nullcontext())


def gradients(model: nn.Module, x: Tensor, context=None) -> Tensor:
    with context or nullcontext():
        y = model(x)
    weighted_sum(y.float()).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:rebuilding a torch:UserWarning")
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_low_precision_stream_is_at_most_twice_as_far_off_as_its_twin(dtype, autocast):
    """One rounding of ``dtype`` is allowed as well: a GPU accumulates in float32, so the twin may be exact."""
    model, x, context = low_precision(dtype, autocast)
    twin, exact = plain_twin(model), plain_twin(model).double()
    wanted = gradients(exact, x.double())
    errors = [(gradients(m, x, context) - wanted).norm() / wanted.norm() for m in (model, twin)]
    assert 0 < errors[1] < 0.5
    assert errors[0] < 2 * max(errors[1], torch.finfo(dtype).eps), errors


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_low_precision_stream_warns_once(dtype, autocast):
    model, x, context = low_precision(dtype, autocast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            gradients(model, x, context)
    assert [str(w.message) for w in caught if w.category is UserWarning and "rebuilding" in str(w.message)] == [
        f"rebuilding a {dtype} stream adds as much rounding as computing it, so that gradients are wrong by several "
        "percent, and by more in deeper chains: give the blocks float32 (x.float()) and run their branches under "
        "torch.autocast, or use keep_input=True"
    ]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_remedies_of_the_warning_help(dtype):
    """Warnings are errors in these tests, so neither remedy warns."""
    model, x, context = low_precision(dtype, True)
    twin = plain_twin(model)
    got, wanted = gradients(model, x.float(), context), gradients(twin, x.float(), autocasting(dtype))
    assert (got - wanted).norm() < torch.finfo(dtype).eps * wanted.norm()

    model, x, _ = low_precision(dtype, False)
    twin = plain_twin(model)
    for block in model:
        block.keep_input = True
    assert torch.equal(gradients(model, x), gradients(twin, x))


@pytest.mark.parametrize(("direction", "option"), [("forward", "keep_input"), ("inverse", "keep_input_inverse")])
def test_a_sequence_keeps_the_inputs_that_its_blocks_ask_for(direction, option):
    """Therefore it does not warn, and gradients are equal bit for bit."""
    couplings = (AdditiveCoupling(conv_branch(), conv_branch()) for _ in range(3))
    model = ReversibleSequential(*(InvertibleModuleWrapper(c, **{option: True}) for c in couplings)).bfloat16()
    twin = plain_twin(model)
    got, wanted = (
        torch.autograd.grad(weighted_sum(getattr(m, direction)(x)), x)[0]
        for m in (model, twin)
        for x in [images(dtype=torch.bfloat16)]
    )
    assert torch.equal(got, wanted)
