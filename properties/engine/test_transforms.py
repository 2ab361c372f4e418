"""torch.func, forward mode, checkpoint, saved-tensor hooks and anomaly mode, around blocks and inside of branches."""

import pytest
import torch
import torch.autograd.forward_ad as fw
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from memcnn.engine import retained
from memcnn.engine.chain import Value
from memcnn.engine.recompute import Activation
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.held import living
from properties.support.twin import (
    assert_like_twin,
    assert_same,
    block,
    conv_branch,
    images,
    plain_twin,
    run,
    weighted_sum,
)

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),  # torch's own use
]


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = conv_branch()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.net(x), 0.4)


def linear_branch() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def network() -> nn.Module:
    """(N, 6) to (N, 6)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6).double(), block(linear_branch), block(linear_branch))


def rows(*shape: int) -> Tensor:
    return images(*(shape or (4, 6)), requires_grad=False)


def detached(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: p.detach() * factor for name, p in model.named_parameters()}


def gradient_of_the_input(model):
    return grad(lambda x: weighted_sum(model(x)))(rows())


def gradient_of_the_parameters(model):
    x = rows()
    return grad(lambda p: weighted_sum(functional_call(model, p, (x,))))(detached(model))


def vector_jacobian_product(model):
    return vjp(model, rows())[1](rows().cos())


def jacobian_in_reverse(model):
    return jacrev(model)(rows(1, 6))


def jacobian_forwards(model):
    return jacfwd(model)(rows(1, 6))


def hessian_of_the_input(model):
    return hessian(lambda x: weighted_sum(model(x)))(rows(1, 6))


def jacobian_vector_product(model):
    return jvp(model, (rows(),), (rows().cos(),))


def gradients_of_each_sample(model):
    def of_one(p, x):
        return weighted_sum(functional_call(model, p, (x,)))

    return vmap(grad(of_one), (None, 0))(detached(model), rows(4, 1, 6))


def mapped(model):
    return vmap(model)(rows(4, 1, 6))


def mapped_and_differentiated(model):
    weighted_sum(vmap(model)(rows(4, 1, 6))).backward()
    return [p.grad for p in model.parameters()]


def dual_numbers(model):
    with fw.dual_level():
        return fw.unpack_dual(model(fw.make_dual(rows(), rows().cos()))).tangent


def forward_over_reverse(model):
    x = rows().requires_grad_()
    with fw.dual_level():
        loss = weighted_sum(model(fw.make_dual(x, rows().cos())).sin())
        (gradient,) = torch.autograd.grad(loss, x)
        return tuple(fw.unpack_dual(gradient))


def other_parameters(model):
    parameters = {name: p.requires_grad_() for name, p in detached(model, 2.0).items()}
    weighted_sum(functional_call(model, parameters, (rows(),))).backward()
    return [p.grad for p in parameters.values()]


def computed_parameters(model):
    """As a hypernetwork makes them, or one step of gradient descent unrolled."""
    leaves = {name: p.requires_grad_() for name, p in detached(model).items()}
    weighted_sum(functional_call(model, {name: p * 2 for name, p in leaves.items()}, (rows(),))).backward()
    return [p.grad for p in leaves.values()]


def an_unrolled_training_step(model):
    parameters = {name: p.requires_grad_() for name, p in detached(model).items()}
    inner = weighted_sum(functional_call(model, parameters, (rows(),)).sin())
    gradients = torch.autograd.grad(inner, list(parameters.values()), create_graph=True)
    stepped = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    weighted_sum(functional_call(model, stepped, (rows(2, 6),))).backward()
    return [p.grad for p in parameters.values()]


TRANSFORMS = [
    gradient_of_the_input,
    gradient_of_the_parameters,
    vector_jacobian_product,
    jacobian_in_reverse,
    jacobian_forwards,
    hessian_of_the_input,
    jacobian_vector_product,
    gradients_of_each_sample,
    mapped,
    mapped_and_differentiated,
    dual_numbers,
    forward_over_reverse,
    other_parameters,
    computed_parameters,
    an_unrolled_training_step,
]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda transform: transform.__name__)
def test_a_transform_gives_what_it_gives_on_the_twin(transform):
    model = network()
    expected = tree_leaves(transform(plain_twin(model)))
    actual = tree_leaves(transform(model))
    assert len(actual) == len(expected) > 0
    for got, wanted in zip(actual, expected, strict=True):
        assert wanted.any()
        assert relative_error(got, wanted) < tolerance(torch.float64, depth=4)
    del actual, got
    assert not living(Activation, Value)


def batched_gradients(model, x):
    y = model(model(x))
    return torch.autograd.grad(y, x, grad_outputs=images(3, *y.shape, requires_grad=False), is_grads_batched=True)


def test_batched_gradients_are_the_twins():
    assert_like_twin(block(), batched_gradients, images())


def test_batched_gradients_of_dropout_are_the_twins_or_refused_by_torch(device):
    """The recomputation runs within the vmap of the backward pass, where PyTorch refuses to draw random numbers.

    It does not notice its own dropout kernel on a GPU. That draws what the forward pass drew, so that nothing is wrong.
    """

    def seeded(model, x):
        torch.manual_seed(0)
        return batched_gradients(model, x)

    if device == "cuda":
        assert_like_twin(block(WithDropout), seeded, images())
    else:
        with pytest.raises(RuntimeError, match="random operations"):
            batched_gradients(block(WithDropout), images())


def test_functional_buffers_are_those_of_the_call():
    def program(model, x):
        named = dict(model.named_parameters()) | {name: b.clone() for name, b in model.named_buffers()}
        model.eval()
        named["_fn.Fm.1.running_mean"] += 3
        weighted_sum(functional_call(model, named, (x,))).backward()

    assert_like_twin(block(), program, images())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, branch=conv_branch):
        super().__init__()
        self.net = branch()
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=self.use_reentrant)


class UnderHooks(nn.Module):
    """Stores its activations by hooks of its own."""

    def __init__(self, hooks):
        super().__init__()
        self.net = conv_branch()
        self.hooks = hooks

    def forward(self, x: Tensor) -> Tensor:
        with self.hooks():
            return self.net(x)


class GradientInside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(x.tanh().square().sum(), x, create_graph=True)
        return gradient


class NoGradientInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.conv(x)
        return gate * self.conv(x.detach()).sin() + x.cos()


class Exponential(torch.autograd.Function):
    """Saves its own output."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * y


class OwnFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return Exponential.apply(self.conv(x).tanh())


def cloning_hooks():
    return saved_tensors_hooks(torch.clone, lambda saved: saved)


BRANCHES = {
    "checkpoint": lambda: Checkpointed(False),
    "checkpointed dropout": lambda: Checkpointed(False, WithDropout),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "save_on_cpu": lambda: UnderHooks(save_on_cpu),
    "hooks": lambda: UnderHooks(cloning_hooks),
    "no_grad and detach": NoGradientInside,
    "a Function that saves its output": OwnFunction,
}


def chain_by_hand(model, x):
    for _ in range(3):
        x = model(x)
    weighted_sum(x).backward()
    return x


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_a_branch_may_use(branch):
    assert_like_twin(block(branch), chain_by_hand, images(), depth=8)


def test_a_branch_that_differentiates_is_refused_and_runs_when_disabled():
    model = block(GradientInside)
    with pytest.raises(RuntimeError, match="GradientInside differentiates within its own forward pass.*disable=True"):
        model(images())
    model.disable = True
    weighted_sum(model(images())).backward()


def two_blocks(model, x):
    return model(model(x))


def blocks_and_others(model, x):
    return model(two_blocks(model, x).sin()).cos()


def program_of(inside, use_reentrant: bool | None):
    def program(model, x):
        x = x.cos()
        y = inside(model, x) if use_reentrant is None else checkpoint(inside, model, x, use_reentrant=use_reentrant)
        weighted_sum(y).backward()
        return y

    return program


@pytest.mark.parametrize("branch", [conv_branch, WithDropout], ids=["conv", "dropout"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pytest.mark.parametrize("inside", [two_blocks, blocks_and_others], ids=lambda inside: inside.__name__)
def test_checkpointed_blocks_train_as_the_checkpointed_twin(inside, use_reentrant, branch):
    model = block(branch)
    twin = plain_twin(model)
    program = program_of(inside, use_reentrant)
    actual, expected = run(model, program, [images()]), run(twin, program, [images()])
    if inside is two_blocks and not use_reentrant:
        # The checkpoint has nothing to rebuild, so that batch norm moves once, where it moves twice in the twin.
        expected.buffers = run(plain_twin(block_like(model)), program_of(inside, None), [images()]).buffers
    assert_same(actual, expected, limit=tolerance(torch.float64, depth=8))


def block_like(model: nn.Module) -> nn.Module:
    """A block with the model's parameters and fresh buffers."""
    fresh = plain_twin(model)
    for part in fresh.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
    return fresh


def around(context):
    def program(model, x):
        with context():
            y = model(model(x.sin())).cos()
            weighted_sum(y).backward()
        return y

    return program


@pytest.mark.parametrize("branch", [conv_branch, WithDropout], ids=["conv", "dropout"])
@pytest.mark.parametrize("context", [save_on_cpu, cloning_hooks], ids=["save_on_cpu", "hooks"])
def test_blocks_under_hooks_train_as_the_twin(context, branch):
    assert_like_twin(block(branch), around(context), images())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
def test_blocks_under_anomaly_mode_train_as_the_twin():
    assert_like_twin(block(WithDropout), around(torch.autograd.detect_anomaly), images())


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_anomaly_mode_finds_a_nan_of_a_branch():
    class SquareRoot(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0).sqrt() * x

    with torch.autograd.detect_anomaly(), pytest.raises(RuntimeError, match="returned nan values"):
        weighted_sum(block(SquareRoot)(images())).backward()


def node_named(name: str, y: Tensor) -> torch.autograd.graph.Node:
    """The first node of that name in the graph of y, from its end."""
    waiting = [y.grad_fn]
    while waiting:
        node = waiting.pop(0)
        if node.name() == name:
            return node
        waiting += [next_node for next_node, _ in node.next_functions if next_node is not None]
    raise LookupError(name)


def test_a_look_into_the_graph_shows_the_activations_and_keeps_none():
    module = nn.Sequential(block(), block()).double()
    twin = plain_twin(module)
    x = images()
    y, wanted = module(x), twin(x)
    for name, saved in (("TanhBackward0", "_saved_result"), ("ConvolutionBackward0", "_saved_input")):
        for _ in range(2):
            seen = getattr(node_named(name, y), saved)
            expected = getattr(node_named(name, wanted), saved)
            assert relative_error(seen, expected) <= tolerance(x.dtype, depth=2)
    del seen
    assert not retained.passes
    assert sum(cell.tensor is not None for cell in living(Value)) == 2, "more than the halves of the end are stored"
    assert all(handle.tensor is None for handle in living(Activation))
    actual = torch.autograd.grad(weighted_sum(y), [x, *module.parameters()])
    expected = torch.autograd.grad(weighted_sum(wanted), [x, *twin.parameters()])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= tolerance(x.dtype, depth=4)
