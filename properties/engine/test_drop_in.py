"""Code written for MemCNN 1.5 runs unchanged: arguments, state-dict keys, the example of its README.

``properties/migration/test_names.py`` has the public names.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import Variable

import memcnn
from properties.support.twin import conv_branch

ARGUMENTS = {
    "InvertibleModuleWrapper": [
        "fn",
        "keep_input",
        "keep_input_inverse",
        "num_bwd_passes",
        "disable",
        "preserve_rng_state",
    ],
    "ReversibleBlock": [
        "Fm",
        "Gm",
        "coupling",
        "keep_input",
        "keep_input_inverse",
        "implementation_fwd",
        "implementation_bwd",
        "adapter",
    ],
    "AdditiveCoupling": ["Fm", "Gm", "implementation_fwd", "implementation_bwd", "split_dim"],
    "AffineCoupling": ["Fm", "Gm", "adapter", "implementation_fwd", "implementation_bwd", "split_dim"],
    "create_coupling": ["Fm", "Gm", "coupling", "implementation_fwd", "implementation_bwd", "adapter"],
    "is_invertible_module": ["module_in", "test_input_shape", "test_input_dtype", "atol", "random_seed"],
}


class ExampleOperation(nn.Module):
    """Convolution, batch norm, ReLU: the operation of the 1.5 README."""

    def __init__(self, channels):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Conv2d(channels, channels, (3, 3), padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )

    def forward(self, x):
        return self.seq(x)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_keep_names_and_order(name):
    assert list(inspect.signature(getattr(memcnn, name)).parameters)[: len(ARGUMENTS[name])] == ARGUMENTS[name]


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        (
            "InvertibleModuleWrapper",
            {
                "keep_input": False,
                "keep_input_inverse": False,
                "num_bwd_passes": 1,
                "disable": False,
                "preserve_rng_state": True,
                "check_inverse": None,
            },
        ),
        (
            "ReversibleBlock",
            {
                "Gm": None,
                "coupling": "additive",
                "keep_input": False,
                "keep_input_inverse": False,
                "implementation_fwd": None,
                "implementation_bwd": None,
                "adapter": None,
                "split_dim": 1,
                "preserve_rng_state": True,
            },
        ),
        (
            "AdditiveCoupling",
            {"Gm": None, "implementation_fwd": None, "implementation_bwd": None, "split_dim": 1, "exact": False},
        ),
        (
            "AffineCoupling",
            {"Gm": None, "adapter": None, "implementation_fwd": None, "implementation_bwd": None, "split_dim": 1},
        ),
        (
            "create_coupling",
            {
                "Gm": None,
                "coupling": "additive",
                "implementation_fwd": None,
                "implementation_bwd": None,
                "adapter": None,
                "split_dim": 1,
            },
        ),
        ("is_invertible_module", {"test_input_dtype": torch.float32, "atol": 1e-6, "random_seed": 42, "device": "cpu"}),
        ("ReversibleSequential", {"keep_every": None, "budget_bytes": None, "exact": None}),
    ],
)
def test_arguments_have_their_defaults(name, defaults):
    parameters = inspect.signature(getattr(memcnn, name)).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


def test_a_block_hands_its_arguments_on():
    F, G = conv_branch(), conv_branch()
    made = memcnn.ReversibleBlock(F, G, "affine", True, False, None, None, memcnn.AffineAdapterNaive, 2, False)
    assert (made.keep_input, made.keep_input_inverse, made.preserve_rng_state) == (True, False, False)
    assert isinstance(made._fn, memcnn.AffineCoupling) and made._fn.split_dim == 2
    assert (made._fn.Fm.f, made._fn.Gm.f) == (F, G)
    made = memcnn.ReversibleBlock(F, G, split_dim=3, keep_input_inverse=True)
    assert (made.keep_input, made.keep_input_inverse, made.preserve_rng_state) == (False, True, True)
    assert isinstance(made._fn, memcnn.AdditiveCoupling) and made._fn.split_dim == 3
    assert (made._fn.Fm, made._fn.Gm) == (F, G)
    with pytest.raises(NotImplementedError, match="unknown coupling 'other'"):
        memcnn.ReversibleBlock(F, coupling="other")


def test_a_wrapper_shows_its_settings():
    settings = {
        "keep_input": True,
        "keep_input_inverse": True,
        "num_bwd_passes": 3,
        "disable": True,
        "preserve_rng_state": False,
        "check_inverse": 0.5,
    }
    made = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(conv_branch()), **settings)
    assert {name: getattr(made, name) for name in settings} == settings


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda: memcnn.AdditiveCoupling(nn.Identity(), split_dim=2), "AdditiveCoupling(\n  split_dim=2\n"),
        (lambda: memcnn.AffineAdapterExp(nn.Identity(), bound=3.0), "AffineAdapterExp(\n  bound=3.0\n"),
        (lambda: memcnn.ActNorm(5), "ActNorm(5)"),
        (lambda: memcnn.InvertibleConv1x1(5), "InvertibleConv1x1(5)"),
        (lambda: memcnn.ChannelPermutation([1, 0]), "ChannelPermutation(2)"),
        (memcnn.SpaceToDepth, "SpaceToDepth(factor=2)"),
        (lambda: memcnn.DepthToSpace(3), "DepthToSpace(factor=3)"),
    ],
    ids=["additive", "exp", "actnorm", "conv1x1", "permutation", "squeeze", "unsqueeze"],
)
def test_a_module_prints_what_it_was_made_of(make, shown):
    assert repr(make()).startswith(shown)


def test_the_readme_example_of_the_original_runs_unchanged():
    X = Variable(torch.rand(2, 10, 8, 8))
    F, G = ExampleOperation(channels=10 // 2), ExampleOperation(channels=10 // 2)
    Y = memcnn.models.revop.ReversibleBlock(F, G)(X)
    Y.sum().backward()
    with torch.no_grad():
        x1, x2 = X.chunk(2, 1)
        y1 = x1 + F(x2)
        assert torch.allclose(Y, torch.cat([y1, x2 + G(y1)], 1))
    assert all(p.grad is not None for p in (*F.parameters(), *G.parameters()))


@pytest.mark.parametrize(
    ("shape", "split_dim", "message"),
    [
        ((2, 9, 8, 8), 1, "its size there, 9, is odd"),
        ((2, 10, 7, 8), 2, "its size there, 7, is odd"),
        ((2, 10), 2, "it has 2 dimensions"),
        ((2, 1, 8, 8), 1, "its size there, 1, is odd"),
    ],
)
def test_shapes_that_cannot_be_halved_are_rejected(shape, split_dim, message):
    block = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(nn.Identity(), split_dim=split_dim))
    for method in (block, block.inverse, block._fn):
        with pytest.raises(ValueError, match=re.escape(str(tuple(shape))) + ".*" + message):
            method(torch.rand(shape, requires_grad=True))


def test_state_dict_keys_are_the_originals():
    keys = memcnn.ReversibleBlock(conv_branch(), conv_branch()).state_dict().keys()
    assert {key.split(".")[0] for key in keys} == {"_fn"}
    assert {key.split(".")[1] for key in keys} == {"Fm", "Gm"}
    assert "_fn.Fm.0.weight" in keys and "_fn.Gm.1.running_mean" in keys


def test_g_is_a_copy_of_f_if_it_is_not_given():
    coupling = memcnn.AdditiveCoupling(conv_branch())
    assert coupling.Gm is not coupling.Fm
    assert all(
        torch.equal(f, g) and f is not g
        for f, g in zip(coupling.Fm.parameters(), coupling.Gm.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    "make", [memcnn.AdditiveCoupling, memcnn.AffineCoupling, memcnn.ReversibleBlock, memcnn.create_coupling]
)
def test_the_implementation_arguments_warn_and_change_nothing(make):
    for arguments in (
        {"implementation_fwd": 1, "implementation_bwd": 0},
        {"implementation_fwd": 0},
        {"implementation_bwd": 0},
    ):
        with pytest.warns(DeprecationWarning, match="have no effect") as warned:
            make(conv_branch(), **arguments)
        own_line = make in (memcnn.AdditiveCoupling, memcnn.AffineCoupling)  # Python shows it there alone
        assert not own_line or warned[0].filename == __file__


def test_num_bwd_passes_is_accepted_and_never_too_few():
    block = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(conv_branch()), num_bwd_passes=1)
    loss = block(torch.rand(2, 6, 4, 4)).square().sum()
    for _ in range(3):
        loss.backward(retain_graph=True)


def test_the_code_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    examples = re.findall(r"([^\n]*)\n\n```python\n(.*?)```", readme, re.DOTALL)
    assert examples
    for text, example in examples:
        if "`blocks.py`" in text:  # where the examples after it import from
            (tmp_path / "blocks.py").write_text(example)
        exec(compile(example, "README.md", "exec"), {})
