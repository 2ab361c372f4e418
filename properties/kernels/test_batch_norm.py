"""Fused norms compute BatchNorm and ReLU, and a second evaluation reuses their statistics.

On a CPU the two operators are plain PyTorch. ``interpreted_sums.py`` tests the kernels that compute them on a GPU.
"""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import memcnn
from memcnn import data as cifar
from memcnn import kernels, reuse
from memcnn.kernels.batch_norm import batch_statistics, gradient_sums
from memcnn.models.resnet import MODELS, CifarResNet, basic_branch, bottleneck_branch
from memcnn.training.compilation import compiled, without_compiler_warnings
from memcnn.training.execution import Execution
from memcnn.training.recipe import PUBLISHED
from memcnn.training.step import TrainingStep
from properties.support.triton import assert_passes_interpreted, needs_triton, needs_triton_and_gpu

pytestmark = [  # the compiler's own
    pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning"),
]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest error of the outputs in each dtype, as norms."""
DEVICES = ["cpu", pytest.param("cuda", marks=needs_triton_and_gpu)]


def error(got: Tensor, wanted: Tensor) -> float:
    """Return the difference to the expected values, as norms."""
    return ((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm()).item()


def layers(channels: int = 6, device: str = "cpu") -> nn.Sequential:
    """Return BatchNorm, ReLU and a convolution, with weights of both signs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1))
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
    return model.to(device)


def images(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    """Return images in channels_last with mean 3 and deviation 2."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 2 + 3
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", [(3, 6, 5, 4), (2, 64, 8, 8), (1, 5, 2, 3), (5, 112, 3, 3)])
def test_it_is_batch_norm_and_relu(shape, dtype, device):
    """Output, gradients and running statistics over three batches, against float64."""
    plain = layers(shape[1], device)[:2].double()
    fused = layers(shape[1], device)
    assert kernels.use_fused_norms(fused) == ["0"]
    for batch in range(3):
        x = (images(*shape, dtype=dtype, device=device) * (batch + 1)).requires_grad_()
        exact = x.detach().double().requires_grad_()
        y, wanted = fused[:2](x), plain(exact)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert error(y, wanted) <= LIMITS[dtype]
        gradient = images(*shape, dtype=dtype, device=device) - 3
        gradient[gradient.abs() < 0.1] = 0
        got = torch.autograd.grad(y, [x, fused[0].weight, fused[0].bias], gradient)
        expected = torch.autograd.grad(wanted, [exact, plain[0].weight, plain[0].bias], gradient.double())
        for ours, theirs in zip(got, expected, strict=True):
            assert error(ours, theirs) <= 20 * LIMITS[torch.float32] + LIMITS[dtype]
    for name in ("running_mean", "running_var"):
        assert error(getattr(fused[0], name), getattr(plain[0], name)) <= 1e-6
    assert fused[0].num_batches_tracked.item() == 3


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own
def test_forward_mode_derivatives_are_those_of_the_plain_layers():
    """``autograd.Function`` has no forward mode, so the plain layers compute."""
    plain, fused = layers(), layers()
    kernels.use_fused_norms(fused)
    x, tangent = images(3, 6, 5, 4), images(3, 6, 5, 4).sin()
    derivatives = []
    for model in (plain, fused):
        with forward_ad.dual_level():
            derivatives.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent)
    assert derivatives[0] is not None and torch.equal(*derivatives)
    assert torch.equal(plain[0].running_var, fused[0].running_var)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # PyTorch's own
def test_forward_mode_derivatives_of_gradients_are_not_dropped():
    """The graph is recorded outside of the transform."""
    x, tangent, derivatives = images(3, 6, 5, 4).requires_grad_(), images(3, 6, 5, 4).sin(), []
    for fused in (False, True):
        model = layers()
        if fused:
            kernels.use_fused_norms(model)
        y, parameters = model(x), [x, *model[0].parameters()]
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(y, parameters, forward_ad.make_dual(y.detach(), tangent))
            derivatives.append([forward_ad.unpack_dual(gradient).tangent for gradient in gradients])
    for ours, plain in zip(*derivatives[::-1], strict=True):
        assert error(ours, plain) <= 1e-5


def test_second_derivatives_raise_within_transforms_too():
    model, x = layers(), images(3, 6, 5, 4).requires_grad_()
    kernels.use_fused_norms(model)
    y = model(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="fused norms have no second derivatives"):
        torch.autograd.grad(y, x, forward_ad.make_dual(y.detach(), y.detach().sin()), create_graph=True)


def test_under_autocast_the_output_is_rounded_once():
    """The convolution would round it anyway. Gradients are as near to float32 as those of PyTorch's own layers."""
    x = images(4, 16, 6, 6)
    plain, fused, exact = layers(16), layers(16), layers(16).double()
    kernels.use_fused_norms(fused)
    seen: list[Tensor] = []
    fused[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    wanted = torch.autograd.grad(exact(x.double()).square().sum(), [*exact.parameters()])
    distances = []
    for model in (plain, fused):
        with torch.autocast("cpu", torch.bfloat16):
            got = torch.autograd.grad(model(x).float().square().sum(), [*model.parameters()])
        distances.append(max(error(ours, theirs) for ours, theirs in zip(got, wanted, strict=True)))
    assert seen[0].dtype == torch.bfloat16
    assert (seen[0] == layers(16)[:2](x).bfloat16()).float().mean() >= 0.99
    assert distances[1] <= 1.2 * distances[0] < 0.1


def noting(function: Callable[[], Tensor | None], calls: list[Tensor | None]) -> Callable[[], Tensor | None]:
    """Return the function; ``calls`` receives its results. None: the statistics are computed, not reused."""

    def noted() -> Tensor | None:
        calls.append(function())
        return calls[-1]

    return noted


@pytest.mark.parametrize("branch", [basic_branch, bottleneck_branch])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_reversible_network_has_the_gradients_of_its_twin(branch, autocast, monkeypatch):
    """Statistics are computed once a step, although each branch is evaluated twice; they move once."""
    results, counts = [], []
    for disable in (True, False):
        torch.manual_seed(0)
        model = CifarResNet(branch, (2, 2), (16, 16, 32), reversible=True, disable=disable)
        model = model.to(memory_format=torch.channels_last)
        names = kernels.use_fused_norms(model)
        calls: list[Tensor | None] = []
        with monkeypatch.context() as patch:
            patch.setattr(reuse, "take", noting(reuse.take, calls))
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = F.cross_entropy(model(images(4, 3, 8, 8)).float(), torch.arange(4))
                loss.backward()
        counts.append((len(names), sum(result is None for result in calls), len(calls)))
        results.append((
            torch.cat([parameter.grad.flatten() for parameter in model.parameters()]),
            [buffer.clone() for buffer in model.buffers()],
        ))  # fmt: skip
    norms = counts[0][0]
    assert counts[0] == (norms, 2 * norms, 2 * norms)
    assert counts[1][:2] == (norms, 2 * norms) and counts[1][2] > 3 * norms
    (stored, buffers), (rebuilt, again) = results
    assert error(rebuilt, stored) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(buffers, again, strict=True))


def test_a_branch_may_read_the_statistics_that_its_norm_has_moved():
    """The second evaluation moves them again, so it computes the statistics instead of reusing them."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers()
            kernels.use_fused_norms(self)

        def forward(self, x: Tensor) -> Tensor:
            y, norm = self.layers(x), self.layers[0]
            return (y * norm.running_mean.mean() * norm.running_var.mean() * norm.num_batches_tracked).tanh()

    results = []
    for disable in (True, False):
        block = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(Reads(), Reads()), disable=disable)
        for _ in range(2):
            block.zero_grad()
            block(images(3, 12, 4, 4)).square().sum().backward()
        results.append([*[p.grad for p in block.parameters()], *[b.float() for b in block.buffers()]])
    for stored, rebuilt in zip(*results, strict=True):
        assert error(rebuilt, stored) <= 1e-4


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_branches_have_the_gradients_of_uncompiled_ones(backend):
    torch._dynamo.reset()
    results = []
    for way in ("uncompiled", "compiled"):
        torch.manual_seed(0)
        F_, G_ = basic_branch(16, 16), basic_branch(16, 16)
        block = memcnn.InvertibleModuleWrapper(memcnn.AdditiveCoupling(F_, G_)).to(memory_format=torch.channels_last)
        assert len(kernels.use_fused_norms(block)) == 4
        if way == "compiled":
            F_.compile(backend=backend, dynamic=False)
            G_.compile(backend=backend, dynamic=False)
        x = images(2, 32, 6, 6).requires_grad_()
        with without_compiler_warnings():
            block(x).square().sum().backward()
        results.append([x.grad, *[p.grad for p in block.parameters()], *[b.float() for b in block.buffers()]])
    for ours, theirs in zip(*results, strict=True):
        assert error(ours, theirs) <= 1e-5


def test_a_whole_compiled_network_with_combined_kernels_trains_as_the_plain_one():
    torch._dynamo.reset()
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = CifarResNet(basic_branch, (1, 1), (16, 16, 32)).to(memory_format=torch.channels_last)
        forward = model
        if fused:
            kernels.use_fused_norms(model)
            forward = compiled(model, combine_kernels=True)
        with without_compiler_warnings():
            F.cross_entropy(forward(images(4, 3, 8, 8)), torch.arange(4)).backward()
        results.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert error(results[1], results[0]) <= 1e-5


@pytest.mark.parametrize(("network", "count"), [("resnet32", 29), ("resnet164", 161), ("revnet38", 30)])
def test_swapping_changes_the_class_and_nothing_else(network, count):
    model = MODELS[network]()
    keys, modules = list(model.state_dict()), list(model.modules())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    changed = kernels.use_fused_norms(model)
    assert len(changed) == count
    assert all(type(model.get_submodule(name)) is kernels.BatchNormReLU2d for name in changed)
    assert list(model.state_dict()) == keys
    for before, after in ((parameters, model.parameters()), (buffers, model.buffers()), (modules, model.modules())):
        assert all(a is b for a, b in zip(before, after, strict=True))
    assert kernels.use_fused_norms(model) == []
    assert kernels.use_fused_norms(model, enabled=False) == changed
    fused = (kernels.BatchNormReLU2d, kernels.SkippedReLU)
    assert not any(isinstance(module, fused) for module in model.modules())


def test_swapped_modules_copy_pickle_and_compute():
    model, x = layers(), images(2, 6, 3, 3)
    expected, in_evaluation = layers()(x), layers().eval()(x)
    kernels.use_fused_norms(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is kernels.BatchNormReLU2d
        assert torch.equal(copy.deepcopy(other).eval()(x), in_evaluation)
        assert error(other(x), expected) <= 1e-6


class Skips(nn.Sequential):
    """A sequence with a forward function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self[2](self[1](x + self[0](x)))


def spoiled(change: str) -> nn.Module:
    """Return layers that ``use_fused_norms`` must leave alone, for the reason named."""
    model = layers()
    if change == "hook of the norm":
        model[0].register_forward_hook(lambda *_: None)
    elif change == "hook of the ReLU":
        model[1].register_full_backward_hook(lambda *_: None)
    elif change == "no parameters":
        model[0] = nn.BatchNorm2d(6, affine=False)
    elif change == "no running statistics":
        model[0] = nn.BatchNorm2d(6, track_running_stats=False)
    elif change == "cumulative average":
        model[0] = nn.BatchNorm2d(6, momentum=None)
    elif change == "another activation":
        model[1] = nn.GELU()
    elif change == "no convolution after it":
        model[2] = nn.AdaptiveAvgPool2d(1)
    elif change == "a synchronised norm":
        model[0] = nn.SyncBatchNorm(6)
    elif change == "a shared ReLU":
        model = nn.Sequential(*model, model[1])
    elif change == "a shared norm":
        model = nn.Sequential(*model, nn.Sequential(model[0]))
    elif change == "a forward function of its own":
        model = Skips(*model)
    elif change == "a replaced forward function":
        model[0].forward = model[0].forward
    elif change == "no sequence":
        model = nn.ModuleList(model)
    return model


@pytest.mark.parametrize(
    "change",
    [
        *("hook of the norm", "hook of the ReLU", "no parameters", "no running statistics", "cumulative average"),
        *("another activation", "no convolution after it", "a synchronised norm", "a shared ReLU", "a shared norm"),
        *("a forward function of its own", "a replaced forward function", "no sequence"),
    ],
)
def test_other_layers_stay(change):
    assert kernels.use_fused_norms(layers()) == ["0"]
    assert kernels.use_fused_norms(spoiled(change)) == []


@pytest.mark.parametrize("change", ["momentum", "tracking", "float64", "one value", "evaluation", "3-D"])
def test_a_module_that_is_changed_after_the_swap_stays_right(change):
    """It computes what PyTorch's own layers do, or raises their error."""
    fused, plain = layers(), layers()
    kernels.use_fused_norms(fused)
    x = images(2, 6, 3, 3)
    for model in (fused, plain):
        if change == "momentum":
            model[0].momentum = None
        elif change == "tracking":
            model[0].track_running_stats = False
        elif change == "float64":
            model.double()
        elif change == "evaluation":
            model.eval()
    if change in ("one value", "3-D"):
        x = x[:1, :, :1, :1] if change == "one value" else x[0]
        with pytest.raises(ValueError, match="more than 1 value per channel|expected 4D input") as theirs:
            plain(x)
        with pytest.raises(ValueError, match=f"^{re.escape(str(theirs.value))}$"):
            fused(x)
        return
    x = x.double() if change == "float64" else x
    for _ in range(2):
        assert torch.equal(fused(x), plain(x))
    for a, b in zip(fused.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_with_the_kernels_under_the_interpreter():
    """The tests above, with the kernels instead of plain PyTorch."""
    assert_passes_interpreted(__file__, "-k", "(batch_norm_and_relu and cpu) or autocast or twin or opcheck")


def test_operators_pass_opcheck():
    x, buffers = images(2, 6, 3, 3), [torch.zeros(6), torch.ones(6), torch.tensor(0)]
    torch.library.opcheck(batch_statistics, (x, *buffers, 0.1, 1e-5))
    statistics = batch_statistics(x, *buffers, 0.1, 1e-5)
    torch.library.opcheck(gradient_sums, (images(2, 6, 3, 3), x, statistics, torch.ones(6), torch.zeros(6)))


def test_second_derivatives_raise_an_error():
    model, x = layers(), images(2, 6, 3, 3).requires_grad_()
    kernels.use_fused_norms(model)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="gradient_sums"):
        gradient.square().sum().backward()


@needs_triton_and_gpu
def test_on_a_gpu_a_captured_step_trains_as_without_fused_norms():
    """Losses of ten steps agree as far as bfloat16 allows. The statistics are updated once a step."""
    torch._dynamo.reset()
    device = torch.device("cuda")
    data = cifar.generate(10, train=400, test=1).to(device)
    plan = cifar.epoch_plan(0, 0, 400, pad=2, flip=True).to(device)
    losses, counts = [], []
    for fused in (False, True):
        execution = Execution(precision="bf16", graph=True, compile=True, fused_norms=fused, combine_kernels=fused)
        torch.manual_seed(0)
        model = CifarResNet(basic_branch, (2, 2), (32, 32, 64), reversible=True)
        step = TrainingStep(model.to(device, memory_format=torch.channels_last), PUBLISHED, data, execution)
        with execution.settings(device):
            for i in range(10):
                step(plan.part(100 * (i % 4), 100 * (i % 4) + 100), 0.01)
        losses.append(step.totals[0].item() / 10)
        counts.append({module.num_batches_tracked.item() for module in model.modules() if hasattr(module, "momentum")})
    assert abs(losses[1] - losses[0]) <= 0.02 * losses[0]
    assert counts == [{10}, {10}]


def test_the_trainer_fuses_norms_only_on_request_and_only_where_it_helps(monkeypatch):
    wanted = Execution(precision="bf16", compile=True, fused_norms=True, combine_kernels=True)
    monkeypatch.setattr("memcnn.training.execution.has_triton", lambda: True)
    assert wanted.on(torch.device("cuda")) == (wanted, [])
    effective, reasons = wanted.on(torch.device("cpu"))
    assert not effective.fused_norms and not effective.combine_kernels
    assert [reason.split(" has no effect ")[0] for reason in reasons] == ["fused-norms", "combine-kernels"]
    uncompiled = Execution(fused_norms=True, combine_kernels=True).on(torch.device("cuda"))[1]
    assert uncompiled == [f"{name} has no effect without --compile" for name in ("fused-norms", "combine-kernels")]
    assert str(wanted) == "bf16, compile, fused-norms, combine-kernels"
    assert not Execution.fastest(torch.device("cuda")).fused_norms
