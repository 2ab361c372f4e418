"""``narrow_conv2d`` is ``F.conv2d``, where Triton's interpreter runs our kernels.

The variable must be set before Triton is imported, so ``test_narrow_conv.py`` runs this file in a process of its own.
By hand: ``TRITON_INTERPRET=1 pytest properties/kernels/interpreted.py``.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from memcnn import kernels
from memcnn.kernels.convolution import conv3x3, conv3x3_weight_gradient
from memcnn.models.resnet import CifarResNet, basic_branch
from properties.support.narrow_conv import (
    LIMITS,
    conv2d,
    error,
    exact_convolution,
    exact_weight_gradient,
    images,
    kernel_wins,
)

pytestmark = [  # the compiler's own
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),  # of torch.func.jvp
]


@pytest.fixture
def chosen():
    """Choose the kernel for every shape, although it is slow under the interpreter."""
    with kernels.choosing(kernels.Choices(kernel_wins)) as choices:
        yield choices


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_output_and_gradients_are_those_of_conv2d(chosen, memory_format):
    """The output gradient may have any strides."""
    x, weight = images(3, 16, 5, 6).requires_grad_(), torch.randn(32, 16, 3, 3).bfloat16().requires_grad_()
    gradient = torch.randn(3, 32, 5, 6).bfloat16().contiguous(memory_format=memory_format)
    results = []
    for convolution in (kernels.narrow_conv2d, lambda x, weight: F.conv2d(x, weight, padding=1)):
        y = convolution(x, weight)
        results.append((y, *torch.autograd.grad(y, (x, weight), gradient)))
    ours, library = results
    assert error(ours[0], exact_convolution(x, weight, transposed=False)) <= LIMITS[torch.bfloat16]
    assert error(ours[1], exact_convolution(gradient, weight, transposed=True)) <= LIMITS[torch.bfloat16]
    assert error(ours[2], exact_weight_gradient(gradient, x)) <= LIMITS[torch.bfloat16]
    assert not any(torch.equal(*pair) for pair in zip(ours, library, strict=True)), "the library computed it"
    assert all(tensor.dtype == torch.bfloat16 for tensor in ours)
    assert [measurement.operation for measurement in chosen.measured()] == [
        "output",
        "input gradient",
        "weight gradient",
    ]
    assert all(measurement.chosen != "library" for measurement in chosen.measured())


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)])
def test_only_wanted_gradients_are_computed(chosen, wanted):
    x, weight = images(2, 16, 4, 4), torch.randn(16, 16, 3, 3).bfloat16()
    x.requires_grad_(wanted[0]), weight.requires_grad_(wanted[1])
    y = kernels.narrow_conv2d(x, weight)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.float().square().sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted
    assert len(chosen.measured()) == 1 + sum(wanted)


@pytest.mark.parametrize("penalised", [0, 1], ids=["input gradient", "weight gradient"])
def test_second_derivative(chosen, penalised):
    """The gradient of a penalty on a first gradient is that of the library's convolution."""
    leaves = [images(2, 16, 4, 5), torch.randn(16, 16, 3, 3).bfloat16() / 12, images(2, 16, 4, 5)]
    for leaf in leaves:
        leaf.requires_grad_()
    results = []
    for convolution in (kernels.narrow_conv2d, lambda x, weight: F.conv2d(x, weight, padding=1)):
        x, weight, gradient = leaves
        first = torch.autograd.grad(convolution(x, weight), (x, weight), gradient, create_graph=True)
        penalty = first[penalised].float().square().sum()
        results.append(torch.autograd.grad(penalty, leaves, allow_unused=True))
    for ours, library in zip(*results, strict=True):
        assert (ours is None) == (library is None)
        assert ours is None or error(ours, library.double()) <= 2 * LIMITS[torch.bfloat16]


def test_unequal_dtypes_raise_as_conv2d_does():
    with pytest.raises(RuntimeError, match="expected scalar type|should be the same"):
        kernels.narrow_conv2d(images(1, 16, 3, 3), torch.randn(16, 16, 3, 3))


def test_under_autocast_the_weight_may_change_before_backward(chosen):
    """As with conv2d, which saves the rounded weight alone."""
    results = []
    for convolution in (kernels.narrow_conv2d, lambda x, weight: F.conv2d(x, weight, padding=1)):
        torch.manual_seed(0)
        x, weight = images(2, 16, 4, 5).requires_grad_(), torch.randn(16, 16, 3, 3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = convolution(x, weight).float().square().sum()
        with torch.no_grad():
            weight.zero_()
        results.append(torch.autograd.grad(loss, (x, weight)))
    for ours, library in zip(*results, strict=True):
        assert error(ours, library) <= 2 * LIMITS[torch.bfloat16]


def test_operators_pass_opcheck(chosen):
    arguments = images(1, 16, 3, 3).requires_grad_(), images(16, 16, 3, 3).requires_grad_()
    for transposed in (False, True):
        torch.library.opcheck(conv3x3, (*arguments, transposed))
    arguments = images(1, 16, 3, 3).requires_grad_(), images(1, 16, 3, 3).requires_grad_()
    for dtype in (torch.bfloat16, torch.float32):
        torch.library.opcheck(conv3x3_weight_gradient, (*arguments, dtype))


def test_weight_in_float32_gets_its_gradient_without_rounding_to_bfloat16(chosen):
    """Under autocast; the library's gradient would be rounded to bfloat16 first."""
    x, gradient = (images(2, 16, 5, 6) for _ in range(2))
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = kernels.narrow_conv2d(x, weight)
    (got,) = torch.autograd.grad(y, weight, gradient)
    assert got.dtype == torch.float32
    assert error(got, exact_weight_gradient(gradient, x)) <= LIMITS[torch.float32]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_without_a_graph_break(chosen, autocast):
    torch._dynamo.reset()
    dtype = torch.float32 if autocast else torch.bfloat16
    x = images(2, 16, 4, 5, dtype=dtype).requires_grad_()
    weight = torch.randn(16, 16, 3, 3, dtype=dtype).requires_grad_()
    results = []
    for convolution in (
        kernels.narrow_conv2d,
        torch.compile(kernels.narrow_conv2d, fullgraph=True, backend="aot_eager"),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = convolution(x, weight)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.float().square().sum(), (x, weight))))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert [gradient.dtype for gradient in results[0][1:]] == [dtype, dtype]
    assert len(chosen.measured()) == 3  # measured when they ran, because compiling has no values to measure with


def test_in_a_reversible_network(chosen):
    """A reversible network has the gradients of its twin, which stores its activations, bit for bit."""
    results = []
    for disable in (False, True):
        torch.manual_seed(0)
        model = CifarResNet(basic_branch, (1,), (32, 32), reversible=True, disable=disable)
        model = model.to(memory_format=torch.channels_last)
        assert len(kernels.use_narrow_convolutions(model)) == 4
        x = images(2, 3, 3, 4, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), torch.tensor([1, 2]))
        loss.backward()
        results.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert [measurement.chosen != "library" for measurement in chosen.measured()] == [True] * 3


def test_swapped_module_uses_the_kernel(chosen):
    layer = nn.Conv2d(16, 16, 3, padding=1, bias=False).bfloat16()
    kernels.use_narrow_convolutions(layer)
    layer(images(1, 16, 3, 3)).sum().backward()
    assert [measurement.operation for measurement in chosen.measured()] == ["output", "weight gradient"]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_output_has_the_same_bits_in_every_mode(chosen, mode):
    """A reversible block evaluates its branches in several modes; a difference would be an error of the inverse."""
    x, weight = images(2, 16, 4, 5), torch.randn(16, 16, 3, 3).bfloat16().requires_grad_()
    with mode():
        output = kernels.narrow_conv2d(x, weight)
    assert torch.equal(output, kernels.narrow_conv2d(x, weight.detach()))
    assert [measurement.operation for measurement in chosen.measured()] == ["output"]


def transformed(convolution: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    """Return a batched result, a forward-mode derivative and a gradient of a convolution, by ``torch.func``."""
    with torch.no_grad():
        batched = torch.func.vmap(lambda image: convolution(image[None], weight))(x)
    derivative = torch.func.jvp(lambda x: convolution(x, weight), (x,), (x.sin(),))[1]
    gradient = torch.func.grad(lambda weight: convolution(x, weight).float().square().sum())(weight)
    return [batched, derivative, gradient]


def test_transforms_use_the_library(chosen):
    """PyTorch has no forward-mode derivative of our operators, and would drop it without a word."""
    x, weight = images(3, 16, 4, 5), torch.randn(16, 16, 3, 3).bfloat16()
    ours, library = (transformed(convolution, x, weight) for convolution in (kernels.narrow_conv2d, conv2d))
    assert all(torch.equal(*pair) for pair in zip(ours, library, strict=True))
    assert chosen.measured() == []


def forward_over_reverse(
    convolution: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, gradient: Tensor
) -> list[Tensor]:
    """Return forward-mode derivatives of first and second gradients, of a graph that was recorded outside of them."""
    y = convolution(x, weight)
    of_first = torch.func.jvp(
        lambda gradient: torch.autograd.grad(y, (x, weight), gradient, retain_graph=True),
        (gradient,),
        (gradient.sin(),),
    )[1]
    leaf = gradient.clone().requires_grad_()
    firsts = torch.autograd.grad(convolution(x, weight), (x, weight), leaf, create_graph=True)
    found = [*of_first]
    for one in firsts:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.ones_like(one), torch.ones_like(one))
            seconds = torch.autograd.grad(one, (x, weight, leaf), dual, retain_graph=True, allow_unused=True)
            found += [forward_ad.unpack_dual(value).tangent for value in seconds if value is not None]
    return found


def test_forward_mode_derivatives_of_gradients_are_not_dropped(chosen):
    x, weight = images(2, 16, 4, 5).requires_grad_(), torch.randn(16, 16, 3, 3).bfloat16().requires_grad_()
    gradient = images(2, 16, 4, 5)
    ours, library = (forward_over_reverse(c, x, weight, gradient) for c in (kernels.narrow_conv2d, conv2d))
    assert len(ours) == len(library) == 6
    for got, expected in zip(ours, library, strict=True):
        assert error(got, expected) <= 2 * LIMITS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float64], ids=str)
@pytest.mark.parametrize("argument", [0, 1], ids=["x", "weight"])
def test_autocast_casts_the_dtypes_that_it_casts_for_conv2d_alone(chosen, dtype, argument):
    arguments = [images(1, 16, 3, 3), images(16, 16, 3, 3)]
    arguments[argument] = arguments[argument].to(dtype)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError) as library:
        conv2d(*arguments)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError) as ours:
        kernels.narrow_conv2d(*arguments)
    assert str(ours.value) == str(library.value)


def test_a_weight_of_the_inputs_dtype_is_saved_itself(chosen):
    """So hooks recognise the parameter, and new data of the weight counts, as with conv2d."""
    x, weight = images(2, 16, 4, 5).requires_grad_(), nn.Parameter(torch.randn(16, 16, 3, 3).bfloat16())
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = kernels.narrow_conv2d(x, weight)
    assert saved[0] is x and saved[1] is weight
    weight.data = torch.randn(16, 16, 3, 3).bfloat16()
    gradient = images(2, 16, 4, 5)
    (got,) = torch.autograd.grad(y, x, gradient)
    assert error(got, exact_convolution(gradient, weight, transposed=True)) <= LIMITS[torch.bfloat16]


def test_torch_fx_traces_a_swapped_model(chosen):
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.ReLU()).bfloat16()
    kernels.use_narrow_convolutions(model)
    traced = torch.fx.symbolic_trace(model)
    x = images(1, 16, 3, 3)
    assert error(traced(x), model(x)) <= LIMITS[torch.bfloat16]


def test_floating_point_operations_are_counted(chosen):
    """As many as ``F.conv2d`` has, by ``torch.utils.flop_counter``."""
    x, weight = images(2, 16, 4, 5).requires_grad_(), torch.randn(32, 16, 3, 3).bfloat16().requires_grad_()
    counts = []
    for convolution in (kernels.narrow_conv2d, lambda x, weight: F.conv2d(x, weight, padding=1)):
        with FlopCounterMode(display=False) as counter:
            convolution(x, weight).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 9 * 16 * 32 * 2 * 4 * 5
