"""The networks of the CIFAR experiments have the published architecture: sizes, strides, widths, order."""

import pytest
import torch
from torch import nn

from memcnn.models.resnet import MODELS, CifarResNet, basic_branch, bottleneck_branch
from memcnn.models.revop import InvertibleModuleWrapper

PARAMETERS = {  # 10 and 100 classes; Gomez et al., arXiv:1707.04585
    "resnet32": (466_906, 472_756),
    "resnet110": (1_730_714, 1_736_564),
    "resnet164": (1_704_154, 1_727_284),
    "revnet38": (573_994, 584_164),
    "revnet110": (1_854_890, 1_866_500),
    "revnet164": (1_983_786, 2_029_956),
}
STEM_AND_STAGES = {
    "resnet32": ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)),
    "resnet110": ((16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)),
    "resnet164": ((16, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8)),
    "revnet38": ((32, 32, 32), (32, 32, 32), (64, 16, 16), (112, 8, 8)),
    "revnet110": ((32, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)),
    "revnet164": ((32, 32, 32), (128, 32, 32), (256, 16, 16), (512, 8, 8)),
}
UNITS = {
    "resnet32": (5, 5, 5),
    "resnet110": (18, 18, 18),
    "resnet164": (18, 18, 18),
    "revnet38": (3, 3, 3),
    "revnet110": (9, 9, 9),
    "revnet164": (9, 9, 9),
}
REVERSIBLE = {"resnet32": 0, "resnet110": 0, "resnet164": 0, "revnet38": 7, "revnet110": 25, "revnet164": 24}


def made(name: str, *arguments, **options) -> CifarResNet:
    with torch.device("meta"):
        return MODELS[name](*arguments, **options)


def kinds(module: nn.Module) -> list[str]:
    return [type(part).__name__ for part in module]


@pytest.mark.parametrize("name", MODELS)
def test_a_network_has_the_published_number_of_parameters(name):
    default, hundred = made(name), made(name, 100)
    assert tuple(sum(p.numel() for p in m.parameters()) for m in (default, hundred)) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_stages_have_the_published_units_widths_and_strides(name):
    network = made(name)
    shapes = []
    for part in (network.stem, *network.stages):
        part.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    assert network(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert tuple(shapes) == STEM_AND_STAGES[name]
    assert tuple(map(len, network.stages)) == UNITS[name]
    assert sum(isinstance(m, InvertibleModuleWrapper) for m in network.modules()) == REVERSIBLE[name]


@pytest.mark.parametrize(
    ("branch", "convolutions"),
    [
        (basic_branch, [(8, 12, 3, 2, 1), (12, 12, 3, 1, 1)]),
        (bottleneck_branch, [(8, 3, 1, 1, 0), (3, 3, 3, 2, 1), (3, 12, 1, 1, 0)]),
    ],
)
def test_a_branch_normalises_and_activates_before_every_convolution(branch, convolutions):
    part = branch(8, 12, 2)
    found = [m for m in part if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0]) for m in found] == convolutions
    assert all(m.bias is None for m in found)
    assert kinds(part) == ["BatchNorm2d", "ReLU", "Conv2d"] * len(convolutions)
    assert kinds(branch(8, 12, activate=False)) == kinds(part)[2:]
    assert [m.stride for m in branch(8, 12) if isinstance(m, nn.Conv2d)] == [(1, 1)] * len(convolutions)


def test_a_unit_that_strides_or_widens_projects_its_input_and_only_the_first_unit_starts_unactivated():
    network = CifarResNet(basic_branch, (2, 2), (6, 8, 8))
    (first, second), (strided, last) = network.stages
    assert kinds(first.shortcut) == kinds(strided.shortcut) == ["Conv2d", "BatchNorm2d"]
    assert (first.shortcut[0].kernel_size, first.shortcut[0].stride, first.shortcut[0].bias) == ((1, 1), (1, 1), None)
    assert strided.shortcut[0].stride == (2, 2) and strided.shortcut[0].bias is None
    assert isinstance(second.shortcut, nn.Identity) and isinstance(last.shortcut, nn.Identity)
    assert [kinds(unit.branch)[0] for unit in (first, second, strided, last)] == ["Conv2d", *["BatchNorm2d"] * 3]
    assert kinds(network.stem) == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert network.head[-1].out_features == 10
    assert kinds(network.head) == ["BatchNorm2d", "ReLU", "AdaptiveAvgPool2d", "Flatten", "Linear"]


def test_a_unit_adds_its_branch_to_its_shortcut():
    network = CifarResNet(basic_branch, (1,), (4, 6)).double().eval()
    (unit,) = network.stages[0]
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert torch.equal(unit(x), unit.shortcut(x) + unit.branch(x))


def test_convolutions_start_at_the_fan_out_scale():
    network = CifarResNet(basic_branch, (1,), (64, 128))
    for convolution in (m for m in network.modules() if isinstance(m, nn.Conv2d)):
        fan_out = convolution.out_channels * convolution.kernel_size[0] ** 2
        assert abs(convolution.weight.var().item() * fan_out / 2 - 1) < 0.1


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("revnet")])
def test_options_reach_every_reversible_unit(name):
    blocks = [
        [m for m in made(name, **options).modules() if isinstance(m, InvertibleModuleWrapper)]
        for options in ({}, {"disable": True}, {"exact": True})
    ]
    assert [{block.disable for block in made} for made in blocks] == [{False}, {True}, {False}]
    assert [{block._fn.grid is not None for block in made} for made in blocks] == [{False}, {False}, {True}]
    assert all(block._fn.Fm is not block._fn.Gm for block in blocks[0])


def test_widths_for_another_number_of_stages_are_refused():
    with pytest.raises(ValueError, match="so 3 widths: got 2"):
        CifarResNet(basic_branch, (1, 1), (4, 8))


@pytest.mark.parametrize("branch", [basic_branch, bottleneck_branch])
def test_under_autocast_what_is_inverted_is_float32_and_only_that(branch):
    seen = []
    for reversible in (True, False):
        model = CifarResNet(branch, (2, 2), (8, 8, 16), reversible=reversible)
        for stage in model.stages:
            stage[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert seen == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_without_autocast_a_network_computes_in_the_dtype_of_its_weights(dtype):
    model = CifarResNet(basic_branch, (2, 2), (8, 8, 16), reversible=True).to(dtype)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype
