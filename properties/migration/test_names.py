"""Every public name of MemCNN 1.5.2 is there, with its arguments, or importing it says what replaces it."""

import importlib
import inspect
import json
import re
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from memcnn import AdditiveCoupling, AffineCoupling, InvertibleModuleWrapper, migration
from memcnn.models import resnet
from memcnn.models.additive import AdditiveBlock
from memcnn.models.affine import AffineAdapterNaive, AffineBlock
from memcnn.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet, RevBasicBlock, RevBottleneck
from memcnn.testing import check_all
from properties.migration.write_files import FILES
from properties.support.twin import conv_branch

OLD = json.loads((FILES / "names.json").read_text("utf-8"))
NAMES = [(module, name) for module, names in OLD["defined"].items() for name in names]
PRIVATE = {("memcnn.utils.loss", "_assert_no_grad")}
ABSENT_MODULES = tuple(migration.ABSENT_MODULES)
UNITS = {"BasicBlock": BasicBlock, "Bottleneck": Bottleneck, "RevBasicBlock": RevBasicBlock,
         "RevBottleneck": RevBottleneck}  # fmt: skip


def is_absent(module: str, name: str) -> bool:
    return module.startswith(ABSENT_MODULES) or name in migration.ABSENT.get(module, ())


def test_the_names_that_the_tests_of_1_5_import_are_among_its_public_ones():
    imported = {tuple(name.split(":")) for name in OLD["imported by its tests"]}
    assert imported - PRIVATE <= set(NAMES)


@pytest.mark.parametrize(("module", "name"), [row for row in NAMES if not is_absent(*row)], ids=".".join)
def test_a_name_can_be_imported_from_its_former_module(module, name):
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize(("module", "name"), [row for row in NAMES if is_absent(*row)], ids=".".join)
def test_importing_a_name_that_is_gone_says_what_to_use(module, name):
    with pytest.raises(ImportError, match=r"of MemCNN 1\.5 is not part of this version: use "):
        exec(f"from {module} import {name}", {})


@pytest.mark.parametrize("module", migration.ABSENT_MODULES)
def test_importing_a_module_that_is_gone_says_what_to_use(module):
    with pytest.raises(
        ModuleNotFoundError, match=re.escape(f"{module} of MemCNN 1.5 is not part of this version: use ")
    ):
        importlib.import_module(module)


def test_every_replacement_exists():
    texts = [
        *migration.ABSENT_MODULES.values(),
        *(text for names in migration.ABSENT.values() for text in names.values()),
    ]
    for name in {name for text in texts for name in re.findall(r"(?:memcnn|torch)(?:\.\w+)+", text)}:
        if name.startswith(ABSENT_MODULES):
            continue
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def test_other_missing_names_and_modules_raise_the_usual_errors():
    with pytest.raises(AttributeError, match=r"module 'memcnn\.models\.revop' has no attribute 'nothing'"):
        _ = importlib.import_module("memcnn.models.revop").nothing
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'memcnn\.nothing'"):
        importlib.import_module("memcnn.nothing")
    assert not hasattr(importlib.import_module("memcnn.train"), "nothing")


def test_reloading_adds_no_second_finder():
    before = len(sys.meta_path)
    importlib.reload(migration)
    assert len(sys.meta_path) == before


@pytest.mark.parametrize(("function", "arguments"), [
    (BasicBlock, "inplanes planes stride=1 downsample=None noactivation=False"),
    (Bottleneck, "inplanes planes stride=1 downsample=None noactivation=False"),
    (RevBasicBlock, "inplanes planes stride=1 downsample=None noactivation=False"),
    (RevBottleneck, "inplanes planes stride=1 downsample=None noactivation=False"),
    (resnet.BasicBlockSub, "inplanes planes stride=1 noactivation=False"),
    (resnet.BottleneckSub, "inplanes planes stride=1 noactivation=False"),
    (resnet.conv3x3, "in_planes out_planes stride=1"),
    (resnet.batch_norm, "x"),
    (ResNet, "block layers num_classes=1000 channels_per_layer=None strides=None init_max_pool=False "
             "init_kernel_size=7 batch_norm_fix=True implementation=0"),
    (AdditiveBlock, "Fm Gm=None implementation_fwd=1 implementation_bwd=1"),
    (AffineBlock, "Fm Gm=None implementation_fwd=1 implementation_bwd=1"),
])  # fmt: skip
def test_arguments_are_those_of_1_5(function, arguments):
    parameters = inspect.signature(function).parameters.values()
    shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert shown == arguments.split()


@pytest.mark.parametrize(("old", "new", "F"), [
    (AdditiveBlock, AdditiveCoupling, conv_branch),
    (AffineBlock, AffineCoupling, lambda: AffineAdapterNaive(conv_branch())),
])  # fmt: skip
def test_a_deprecated_block_warns_once_and_is_the_coupling(old, new, F):
    with pytest.warns(DeprecationWarning, match=f"{old.__name__} is deprecated: use {new.__name__}") as warned:
        block = old(F())
    assert len(warned) == 1 and warned[0].filename == __file__
    assert isinstance(block, new)
    assert check_all(block, torch.randn(2, 6, 4, 4)).passed


def test_minus_one_named_the_only_implementation_that_was_not_deprecated():
    AdditiveCoupling(conv_branch(), implementation_fwd=-1, implementation_bwd=-1)
    with pytest.raises(NotImplementedError, match="unknown implementation 2"):
        AdditiveCoupling(conv_branch(), implementation_bwd=2)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("options", [
    {"init_max_pool": True},
    {"channels_per_layer": [4, 4, 8, 12, 16], "strides": [1, 1, 2, 2, 1], "init_kernel_size": 3},
], ids=["defaults", "own sizes"])  # fmt: skip
def test_a_network_of_four_stages_trains(name, options):
    network = ResNet(UNITS[name], [2, 2, 2, 2], num_classes=2, **options)
    logits = network(torch.rand(2, 3, 32, 32))
    logits.square().sum().backward()
    assert logits.shape == (2, 2)
    assert all(p.grad is not None for p in network.parameters())
    assert any(isinstance(m, InvertibleModuleWrapper) for m in network.modules()) == name.startswith("Rev")


@pytest.mark.parametrize(("fix", "settings"), [(True, {(0.99, 1e-3)}), (False, {(0.1, 1e-5)})])
def test_batch_norm_fix_sets_momentum_and_eps(fix, settings):
    network = ResNet(RevBasicBlock, [1, 1, 1], 2, batch_norm_fix=fix)
    assert {(m.momentum, m.eps) for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == settings


def test_the_pool_after_the_stem_is_that_of_1_5():
    x = torch.rand(2, 4, 7, 9)
    pooled = ResNet(BasicBlock, [1], 2, init_max_pool=True).maxpool(x)
    assert torch.equal(pooled, nn.functional.max_pool2d(x, 3, stride=2, padding=1))


def test_weights_are_drawn_by_hes_rule():
    network = ResNet(BasicBlock, [1, 1], 10)
    weight = network.layer2[0].basicblock_sub.conv2.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)


def test_bad_arguments_are_refused_with_the_wanted_ones():
    with pytest.raises(TypeError, match=r"got 'basic_branch'; .* is a memcnn\.models\.resnet\.CifarResNet"):
        ResNet(resnet.basic_branch, (2, 2), 10)
    with pytest.raises(ValueError, match="strides must name the stem and each of the 2 stages, so 3 numbers: got 2"):
        ResNet(BasicBlock, [1, 1], strides=[1, 1])
    with pytest.raises(ValueError, match="a RevBasicBlock with stride 2 needs downsample"):
        RevBasicBlock(4, 4, stride=2)
    with pytest.warns(DeprecationWarning, match="implementation is deprecated"):
        ResNet(BasicBlock, [1], implementation=1)
    assert not issubclass(CifarResNet, ResNet)


def test_importing_everything_warns_of_nothing():
    code = "import memcnn.convert, memcnn.models.legacy, memcnn.models.resnet, memcnn.train"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_units_that_cannot_be_reversible_are_plain():
    shortcut = nn.Conv2d(4, 8, 1, 2)
    unit = RevBasicBlock(4, 8, 2, shortcut)
    assert unit(torch.rand(2, 4, 6, 6)).shape == (2, 8, 3, 3) and not hasattr(unit, "revblock")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RevBottleneck(16, 4)(torch.rand(2, 16, 6, 6)).shape == (2, 16, 6, 6)
