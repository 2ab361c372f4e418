"""Transforms of torch.func, forward mode, and derivatives of derivatives."""

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from memcnn.engine.chain import Value
from memcnn.engine.recompute import Activation
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.blocks import net
from properties.support.held import living
from properties.support.saving import WithDropout
from properties.support.twin import (
    assert_like_twin,
    block,
    images,
    plain_twin,
    weighted_sum,
)

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning"),  # torch's own use
]


def network() -> nn.Module:
    """(N, 6) to (N, 6)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6).double(), block(net), block(net))


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
    """Return computed parameters, as from a hypernetwork or an unrolled step of gradient descent."""
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
