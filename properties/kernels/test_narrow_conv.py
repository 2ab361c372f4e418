"""Narrow convolutions use the library where our kernels cannot run, and the kernels where they were measured to win.

The kernels themselves are tested on a CPU by ``interpreted*.py``, in processes of their own, and on a GPU here.
"""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memcnn import kernels
from memcnn.kernels.choice import fastest, gpu_microseconds
from memcnn.kernels.convolution import conv3x3, conv3x3_weight_gradient
from memcnn.kernels.operations import INPUT_GRADIENT, OPERATIONS, OUTPUT, WEIGHT_GRADIENT
from memcnn.models.resnet import MODELS
from properties.support.triton import assert_passes_interpreted, needs_triton, needs_triton_and_gpu

SHARED_MEMORY_BYTES = 227 * 1024  # of a program on an H100


@needs_triton
@pytest.mark.parametrize("file", ["interpreted.py", "interpreted_kernels.py", "interpreted_choices.py"])
def test_under_the_interpreter(file):
    assert_passes_interpreted(str(Path(__file__).with_name(file)))


def assert_compiles_for_an_h100(kernel, constants: dict, arrays: dict[str, str], plan) -> None:
    """The kernel fits into shared memory, uses the tensor cores, and copies images 16 bytes at a time.

    Args:
        kernel: the Triton function.
        constants: its compile-time arguments.
        arrays: type of each pointer, such as ``*bf16``. The first two are read.
        plan: with its warps and stages.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = dict.fromkeys(names, "constexpr") | arrays | {"pixels": "i32"}
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in (*arrays, "pixels")},
    )
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    code = compiled.asm["ptx"]
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES, plan
    assert "wgmma.mma_async" in code or "mma.sync" in code, plan
    loads = re.findall(r"(?:ld\.global|cp\.async\.c[ag])[^;]*;", code)
    wide = [load for load in loads if ".v4.b32" in load or re.search(r"0x10\b", load)]
    small = constants.get("TAPS") == 1 and constants["C_IN"] == 16  # a tile of the weight: 256 values for 128 threads
    assert wide and len(wide) == len(loads) - (plan.stages if small else 0), plan


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
def test_weight_gradient_kernel_compiles_for_an_h100(channels, size):
    from memcnn.kernels import weight_gradient

    for plan in weight_gradient.plans(channels, channels):
        constants = {
            "TILES": plan.splits(100 * size * size, 132)[1],
            "HEIGHT": size,
            "WIDTH": size,
            "C_OUT": channels,
            "C_IN": channels,
            "ROW_TAPS": plan.row_taps,
            "COLUMN_TAPS": plan.column_taps,
            "PIXELS": plan.pixels,
            "INTERPRETED": False,
        }
        arrays = {"output_gradient": "*bf16", "x": "*bf16", "partial": "*fp32"}
        assert_compiles_for_an_h100(weight_gradient.partial_sums, constants, arrays, plan)


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8)])
def test_convolution_kernel_compiles_for_an_h100(channels, size, transposed):
    from memcnn.kernels import convolution_kernel

    for plan in convolution_kernel.plans(channels):
        constants = {
            "HEIGHT": size,
            "WIDTH": size,
            "C_IN": channels,
            "C_OUT": channels,
            "TAPS": plan.taps,
            "PIXELS": plan.pixels,
            "TRANSPOSED": transposed,
            "INTERPRETED": False,
        }
        arrays = {"images": "*bf16", "weight": "*bf16", "result": "*bf16"}
        assert_compiles_for_an_h100(convolution_kernel.convolution_kernel, constants, arrays, plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 16, 5, 6), (1, 32, 1, 1), (2, 8, 4, 4)])
def test_on_a_cpu_it_is_conv2d(shape, dtype):
    """Bits and graph equal those of conv2d, and nothing is measured."""
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(16, shape[1], 3, 3, dtype=dtype, requires_grad=True)
    results = []
    for convolution in (kernels.narrow_conv2d, lambda x, weight: F.conv2d(x, weight, padding=1)):
        y = convolution(x, weight)
        assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
        results.append((y, *torch.autograd.grad(y.sum(), (x, weight))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert kernels.measured() == []


def test_wrong_shapes_raise_as_conv2d_does():
    with pytest.raises(RuntimeError, match="expected input.* to have 16 channels, but got 32 channels"):
        kernels.narrow_conv2d(torch.zeros(1, 32, 4, 4), torch.zeros(16, 16, 3, 3, requires_grad=True))


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"library": 70.0, "a": 9.0, "b": 8.0}, "b"),
        ({"library": 10.0, "a": 9.0, "b": 9.6}, "a"),
        ({"library": 10.0, "a": 9.6}, "library"),  # within the noise
        ({"library": 10.0, "a": 20.0}, "library"),
        ({"library": 10.0}, "library"),
        ({}, "library"),
    ],
)
def test_the_fastest_is_chosen(times, chosen):
    assert fastest(times) == chosen


def test_nothing_is_measured_during_a_capture_or_in_deterministic_mode(monkeypatch):
    def timer(runs: dict) -> dict[str, float]:
        raise AssertionError("measured")

    choices = kernels.Choices(timer)
    with FakeTensorMode():
        x, gradient = (torch.empty(2, 16, 4, 4, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert choices.plan(WEIGHT_GRADIENT, gradient, x) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.cudnn, "deterministic", True)
        assert choices.plan(WEIGHT_GRADIENT, gradient, x) is None
    assert choices.measured() == []


def test_choosing_restores_the_choices_before():
    choices = kernels.Choices(lambda runs: {})
    with pytest.raises(KeyError), kernels.choosing(choices) as inner:
        assert inner is choices
        raise KeyError
    assert kernels.measured() == []


def test_timing_without_a_gpu_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="pass Choices a timer of your own"):
        gpu_microseconds({"nothing": lambda: None})


@pytest.mark.parametrize(("network", "count"), [("resnet32", 28), ("resnet164", 52), ("revnet38", 21)])
def test_swapping_changes_the_class_and_nothing_else(network, count):
    model = MODELS[network]()
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    changed = kernels.use_narrow_convolutions(model)
    assert len(changed) == count
    assert all(type(model.get_submodule(name)) is kernels.NarrowConv2d for name in changed)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert kernels.use_narrow_convolutions(model) == []
    assert kernels.use_narrow_convolutions(model, enabled=False) == changed
    assert not any(isinstance(module, kernels.NarrowConv2d) for module in model.modules())


def test_swapped_modules_copy_pickle_and_compute():
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
    x = torch.randn(2, 16, 4, 4)
    expected = model(x)
    assert kernels.use_narrow_convolutions(model) == ["0"]
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is kernels.NarrowConv2d
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"bias": True}, {"padding_mode": "reflect"}],
    ids=str,
)
def test_other_convolutions_stay(options):
    layer = nn.Conv2d(16, 16, 3, **({"padding": 1, "bias": False} | options))
    assert kernels.use_narrow_convolutions(layer) == []
    assert kernels.use_narrow_convolutions(nn.Conv2d(16, 16, 1, bias=False)) == []
    assert kernels.use_narrow_convolutions(nn.Conv2d(3, 16, 3, padding=1, bias=False)) == []


def test_a_module_that_is_changed_after_the_swap_stays_right():
    """A module that is given a bias or a stride later uses them."""
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    plain = copy.deepcopy(layer)
    kernels.use_narrow_convolutions(layer)
    x = torch.randn(1, 16, 4, 4)
    for module in (layer, plain):
        module.bias = nn.Parameter(torch.arange(16.0))
        module.stride = (2, 2)
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer(x[0]), plain(x[0]))


def operands(operation, n: int, channels: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors for an operation, on the GPU in bfloat16."""
    images = (n, channels, size, size)
    shapes = images, images if operation is WEIGHT_GRADIENT else (channels, channels, 3, 3)
    first, second = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return first.to(memory_format=torch.channels_last), second.to(memory_format=torch.channels_last)


def exact(operation, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the operation in float64."""
    if operation is OUTPUT:
        return F.conv2d(first.double(), second.double(), padding=1)
    if operation is INPUT_GRADIENT:
        return F.conv_transpose2d(first.double(), second.double(), padding=1)
    weight = torch.zeros(first.shape[1], second.shape[1], 3, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(F.conv2d(second.double(), weight, padding=1), weight, first.double())[0]


@needs_triton_and_gpu
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
@pytest.mark.parametrize(("channels", "size"), [(16, 32), (32, 16), (64, 8), (16, 7)])
def test_on_a_gpu_every_plan_is_right_and_one_is_chosen(channels, size, operation):
    first, second = operands(operation, 33, channels, size)
    expected = exact(operation, first, second)
    plans = operation.plans(first.shape, second.shape)
    assert len(plans) >= 2
    for plan in plans:
        results = [operation.planned(first, second, plan) for _ in range(2)]
        assert torch.equal(*results), plan
        assert (results[0] - expected).abs().max() <= 2**-7 * expected.abs().max(), plan
    choices = kernels.Choices()
    choices.plan(operation, first, second)
    (measurement,) = choices.measured()
    assert not measurement.rejected and all(time > 0 for time in measurement.microseconds.values())


@needs_triton_and_gpu
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_on_a_gpu_a_captured_result_is_the_eager_one(operation):
    """In a graph, measured shapes use the chosen plan, and all other shapes use the library."""
    first, second = operands(operation, 4, 16, 8)

    def compute(images: int = 4) -> torch.Tensor:
        if operation is WEIGHT_GRADIENT:
            return conv3x3_weight_gradient(first[:images], second[:images], first.dtype)
        return conv3x3(first[:images], second, operation is INPUT_GRADIENT)

    with kernels.choosing(kernels.Choices()):
        compute(1)  # initialises the libraries
    torch.cuda.synchronize()
    for measured in (0, 1):
        with kernels.choosing(
            kernels.Choices(lambda runs: {name: float(name == "library") for name in runs})
        ) as choices:
            if measured:
                eager = compute()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = compute()
            graph.replay()
            torch.cuda.synchronize()
            assert len(choices.measured()) == measured
            if not measured:
                eager = torch.empty_like(captured).copy_(captured)
            assert torch.allclose(captured.float(), eager.float(), rtol=2**-6, atol=1e-2)
    assert torch.equal(captured, eager)
