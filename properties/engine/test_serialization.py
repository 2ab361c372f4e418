"""Copies, pickles and saved states of modules, also while a graph refers to them, and saved outputs."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from memcnn import (
    AdditiveCoupling,
    AffineAdapterNaive,
    AffineAdapterSigmoid,
    AffineCoupling,
    InvertibleModuleWrapper,
    ReversibleBlock,
    ReversibleSequential,
)
from memcnn.models.resnet import MODELS
from memcnn.testing.tolerances import tolerance
from properties.support.twin import assert_same, backward, block, conv_branch, images, run, weighted_sum

pytestmark = pytest.mark.usefixtures("on_device")


def sequence() -> ReversibleSequential:
    return ReversibleSequential(AdditiveCoupling(conv_branch(), conv_branch()), block(), keep_every=2).double()


def affine() -> InvertibleModuleWrapper:
    coupling = AffineCoupling(nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), adapter=AffineAdapterSigmoid)
    return InvertibleModuleWrapper(coupling).double()


MAKERS = {"additive": block, "affine": affine, "sequence": sequence}


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved_whole(module: nn.Module) -> nn.Module:
    return loaded(saved(module), weights_only=False)


def saved_state(module: nn.Module) -> nn.Module:
    """Load only the state dict into a module with other initial weights."""
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        for t in fresh.state_dict().values():
            t.zero_()
    fresh.load_state_dict(loaded(saved(module.state_dict()), weights_only=True))
    return fresh


def saved(value: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def loaded(file: io.BytesIO, *, weights_only: bool) -> object:
    return torch.load(file, weights_only=weights_only)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole, saved_state], ids=lambda f: f.__name__)
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "with a graph"])
def test_a_duplicate_trains_as_the_original_and_shares_nothing(make, duplicate, busy):
    module = make()
    loss = weighted_sum(module(images())) if busy else None
    twin = duplicate(module)
    assert {p.data_ptr() for p in twin.parameters()}.isdisjoint(p.data_ptr() for p in module.parameters())
    if busy:
        loss.backward()
        assert all(p.grad is None for p in twin.parameters())
        module.zero_grad()
        twin.load_state_dict(module.state_dict())
    assert_same(run(twin, backward, [images()]), run(module, backward, [images()]), limit=tolerance(torch.float64))


def test_settings_are_part_of_a_pickle():
    settings = {
        "keep_input": True,
        "keep_input_inverse": True,
        "num_bwd_passes": 2,
        "disable": True,
        "preserve_rng_state": False,
        "check_inverse": 1e-3,
    }
    module = block(**settings)
    twin = pickled(module)
    assert {name: getattr(twin, name) for name in settings} == settings
    assert twin._fn.split_dim == module._fn.split_dim
    assert pickled(sequence()).keep_every == 2


@pytest.mark.parametrize(
    ("make", "prefix"),
    [
        (lambda: InvertibleModuleWrapper(AdditiveCoupling(nn.Linear(2, 2))), ""),
        (lambda: InvertibleModuleWrapper(AffineCoupling(nn.Linear(2, 2), adapter=AffineAdapterNaive)), "f."),
        (lambda: ReversibleBlock(nn.Linear(2, 2)), ""),
    ],
    ids=["additive", "affine", "ReversibleBlock"],
)
def test_state_keys_are_those_of_version_1_5_2(make, prefix):
    assert list(make().state_dict()) == [
        f"_fn.{branch}.{prefix}{name}" for branch in ("Fm", "Gm") for name in ("weight", "bias")
    ]


def test_the_states_of_a_module_and_of_its_disabled_self_are_interchangeable():
    module, disabled = block(), block(disable=True)
    disabled.load_state_dict(module.state_dict(), strict=True)
    assert_same(run(module, backward, [images()]), run(disabled, backward, [images()]), limit=tolerance(torch.float64))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
def test_a_networks_state_loads_into_a_disabled_one(name):
    state = loaded(saved(MODELS[name]().state_dict()), weights_only=True)
    twin = MODELS[name](disable=True)
    twin.load_state_dict(state, strict=True)
    assert all(torch.equal(value, state[key]) for key, value in twin.state_dict().items())


def test_an_output_is_saved_and_copied_while_its_graph_lives():
    module = block()
    x = images()
    y = module(x)
    again = loaded(saved(y), weights_only=True)
    assert torch.equal(again, y) and again.requires_grad and again.is_leaf
    assert torch.equal(pickle.loads(pickle.dumps(y.detach())), y)
    weighted_sum(y).backward()
    assert x.grad is not None


def test_an_optimizer_continues_from_a_saved_state():
    def trained(module: nn.Module, optimizer: torch.optim.Optimizer, seeds) -> list[Tensor]:
        for seed in seeds:
            optimizer.zero_grad()
            weighted_sum(module(images(seed=seed))).backward()
            optimizer.step()
        return [p.detach() for p in module.parameters()]

    module = block()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    trained(module, optimizer, range(2))
    file = saved({"module": module.state_dict(), "optimizer": optimizer.state_dict()})
    wanted = trained(module, optimizer, range(2, 4))
    state = loaded(file, weights_only=True)
    again = block()
    again.load_state_dict(state["module"])
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-3, momentum=0.9)
    optimizer.load_state_dict(state["optimizer"])
    assert all(map(torch.equal, trained(again, optimizer, range(2, 4)), wanted))
