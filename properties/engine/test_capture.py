"""While a CUDA graph is captured, a reversible block works as usual or raises an error that names the reason.

The first tests simulate a capture; the tests at the end capture a graph on a GPU.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from memcnn import AdditiveCoupling, InvertibleModuleWrapper
from memcnn.engine import capture, replay
from memcnn.engine.survey import draws_nothing
from memcnn.engine.torch_private import is_compiled
from memcnn.kernels import (
    BatchNormReLU2d,
    NarrowConv2d,
    SkippedReLU,
    use_fused_norms,
    use_narrow_convolutions,
)
from memcnn.models.resnet import MODELS, Branch
from memcnn.training.compilation import compiled
from properties.devices import needs_cuda, reproducible_kernels
from properties.support.compiler import ignore_compiler_warnings
from properties.support.twin import backward, block, conv_branch, images, plain_twin

DROPOUT = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(3, 3, 1))


@pytest.fixture
def capturing(monkeypatch):
    """Let the engine see a capture on every device."""
    for module in (capture, replay):
        monkeypatch.setattr(module, "is_captured", lambda device: True)


def test_no_generator_is_asked_in_a_capture_and_gradients_are_the_twins(capturing, monkeypatch):
    def forbidden(*_):
        raise RuntimeError("Cannot call CUDAGeneratorImpl::current_seed during CUDA graph capture")

    monkeypatch.setattr(replay, "rng_state", forbidden)
    module = block(lambda: nn.Sequential(conv_branch(), nn.GELU(approximate="tanh")))
    twin = plain_twin(module)
    for one in (module, twin):
        backward(one, images())
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_a_branch_that_draws_random_numbers_is_refused_in_a_capture(capturing):
    module = InvertibleModuleWrapper(AdditiveCoupling(DROPOUT, conv_branch())).double()
    with pytest.raises(RuntimeError, match="Sequential draws random numbers .*disable=True"):
        module(images())
    plain_twin(module)(images())
    InvertibleModuleWrapper(AdditiveCoupling(DROPOUT, conv_branch()), preserve_rng_state=False).double()(images())


@pytest.mark.parametrize(
    ("exact", "check_inverse", "fix"), [(True, None, "use exact=False"), (False, 1e-3, "leave it out there")]
)
def test_checks_that_read_values_are_refused_in_a_capture(capturing, exact, check_inverse, fix):
    coupling = AdditiveCoupling(conv_branch(), conv_branch(), exact=exact)
    module = InvertibleModuleWrapper(coupling, check_inverse=check_inverse).double()
    with pytest.raises(RuntimeError, match=f"impossible while a CUDA graph is captured: {fix}"):
        backward(module, images())


class Counting:
    """A compiler backend that counts the calls of the code that it returns."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable:
        def run(*inputs: torch.Tensor) -> tuple:
            self.calls += 1
            return graph.forward(*inputs)

        return run

    def of(self, action: Callable, *arguments: object) -> int:
        """Return the number of calls during ``action(*arguments)``."""
        before = self.calls
        action(*arguments)
        return self.calls - before


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield Counting()
    torch._dynamo.reset()


class OwnCode(nn.Module):
    """A branch of unknown code, which might draw random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_branch()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def compiled_pair(branch: Callable[[], nn.Module], backend: Counting, **options) -> tuple[nn.Module, nn.Module]:
    """Return a block whose branches are compiled, after two steps, and its twin, which is not compiled."""
    module = block(branch, **options)
    twin = plain_twin(module)
    for part in (module._fn.Fm, module._fn.Gm):
        part.compile(backend=backend)
    for _ in range(2):
        backward(module, images())
    twin.load_state_dict(module.state_dict())
    module.zero_grad()
    return module, twin


def assert_same_gradients(module: nn.Module, twin: nn.Module) -> None:
    backward(twin, images())
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@ignore_compiler_warnings
@pytest.mark.parametrize(
    "layers",
    [
        (nn.BatchNorm2d, nn.ReLU, nn.Conv2d),
        (nn.BatchNorm2d, nn.ReLU, NarrowConv2d),
        (BatchNormReLU2d, SkippedReLU, nn.Conv2d),
    ],
    ids=lambda kinds: "-".join(kind.__name__ for kind in kinds),
)
def test_compiled_branches_of_simple_layers_run_compiled_in_a_capture(layers, backend, request):
    norm, relu, convolution = layers

    def branch() -> nn.Module:
        return Branch(norm(3), relu(), convolution(3, 3, 3, padding=1, bias=False))

    module, twin = compiled_pair(branch, backend)
    request.getfixturevalue("capturing")
    assert backend.of(backward, module, images()) == 4  # F and G, forward and in the recomputation
    assert_same_gradients(module, twin)


@pytest.mark.parametrize("name", ["revnet38", "revnet110", "revnet164"])
def test_the_branches_of_the_revnets_are_known_to_draw_no_random_numbers(name):
    """If they were not, ``--graph --compile`` would train with uncompiled branches."""
    model = MODELS[name]()
    use_narrow_convolutions(model)
    use_fused_norms(model)
    compiled(model)
    branches = [branch for part in model.modules() if isinstance(part, AdditiveCoupling) for branch in part.children()]
    assert len(branches) > 10 and all(map(is_compiled, branches))
    assert all(draws_nothing(layer) for branch in branches for layer in branch.modules())


@ignore_compiler_warnings
def test_compiled_branches_with_code_of_their_own_run_uncompiled_in_a_capture_alone(backend, monkeypatch):
    module, twin = compiled_pair(OwnCode, backend)
    with monkeypatch.context() as patch:
        for part in (capture, replay):
            patch.setattr(part, "is_captured", lambda device: True)
        with pytest.warns(UserWarning, match="OwnCode is compiled, but runs uncompiled .*preserve_rng_state=False"):
            assert backend.of(backward, module, images()) == 0
        assert_same_gradients(module, twin)
        module.preserve_rng_state = False
        assert backend.of(backward, module, images()) == 4
    module.preserve_rng_state = True
    assert backend.of(backward, module, images()) == 4, "the capture left the code uncompiled"


@ignore_compiler_warnings
def test_a_module_that_torch_compile_returns_is_named_by_its_class_or_known_to_draw_nothing(backend, request):
    def compiled_block(branch: nn.Module) -> nn.Module:
        return InvertibleModuleWrapper(AdditiveCoupling(torch.compile(branch, backend=backend), conv_branch())).double()

    known, unknown = compiled_block(Branch(*conv_branch())), compiled_block(OwnCode())
    for module in (known, unknown):
        backward(module, images())
    request.getfixturevalue("capturing")
    assert backend.of(backward, known, images()) == 2
    with pytest.warns(UserWarning, match="OwnCode is compiled, but runs uncompiled"):
        assert backend.of(backward, unknown, images()) == 0


@ignore_compiler_warnings
def test_a_compiled_branch_that_draws_random_numbers_is_refused_in_a_capture(backend, request):
    module, _ = compiled_pair(lambda: Branch(*copy.deepcopy(DROPOUT)), backend)
    request.getfixturevalue("capturing")
    with pytest.raises(RuntimeError, match="Branch draws random numbers .*disable=True"):
        module(images())


@ignore_compiler_warnings
def test_a_compiled_branch_with_a_forward_function_of_its_own_may_draw_random_numbers(backend, request):
    def branch() -> nn.Module:
        layers = Branch(*conv_branch())
        layers[2].forward = functional.dropout
        return layers

    module, _ = compiled_pair(branch, backend)
    request.getfixturevalue("capturing")
    with pytest.raises(RuntimeError, match="draws random numbers"):
        module(images())


def step(module: nn.Module, x: torch.Tensor) -> None:
    """Run a training step that copies nothing to the GPU, which a capture forbids."""
    module(x).sin().square().sum().backward()


def captured_step(module: nn.Module, x: torch.Tensor) -> torch.cuda.CUDAGraph:
    """Capture a training step of ``module`` on ``x``, after three warm-up steps on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(module, x)
    torch.cuda.current_stream().wait_stream(stream)
    module.zero_grad()
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(module, x)
    return graph


@needs_cuda
@pytest.mark.parametrize("seed", [0, 1])
def test_a_graph_captured_on_a_gpu_computes_the_twins_gradients_of_any_input(seed):
    module = nn.Sequential(block(), block()).cuda()
    twin = plain_twin(module)
    x = images(requires_grad=False).cuda().requires_grad_()
    other = images(seed=seed, requires_grad=False).cuda().requires_grad_()
    with reproducible_kernels():
        graph = captured_step(module, x)
        with torch.no_grad():
            x.copy_(other)
        graph.replay()
        step(twin, other)
    torch.testing.assert_close(x.grad, other.grad)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@ignore_compiler_warnings
@needs_cuda
def test_compiled_branches_run_compiled_when_a_gpu_captures(backend):
    module = block(lambda: Branch(*conv_branch())).cuda()
    for part in (module._fn.Fm, module._fn.Gm):
        part.compile(backend=backend)
    x = images(requires_grad=False).cuda().requires_grad_()
    captured_step(module, x)
    assert backend.calls == 4 * 4, "F and G are evaluated twice in each of three steps and in the capture"


@needs_cuda
def test_dropout_is_refused_when_a_gpu_captures():
    dropout = copy.deepcopy(DROPOUT)
    module = InvertibleModuleWrapper(AdditiveCoupling(conv_branch(), dropout)).double().cuda()
    x = images(requires_grad=False).cuda().requires_grad_()
    with pytest.raises(RuntimeError, match="Sequential draws random numbers .*disable=True"):
        captured_step(module, x)
    step(module, x)
    assert x.grad.isfinite().all()
