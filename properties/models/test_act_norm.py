"""Activation normalisation: the first pass in training mode sets its parameters, once, and no recomputation does."""

import copy
import io

import pytest
import torch
from torch import nn

from memcnn import ActNorm, AdditiveCoupling, InvertibleModuleWrapper, ReversibleSequential
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.twin import assert_like_twin, backward, data, images, weighted_sum


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_the_first_pass_in_training_normalises_its_result(wrapped, direction):
    layer = ActNorm(6).double()
    block = InvertibleModuleWrapper(layer) if wrapped else layer
    x = 5 + 3 * data(4, 6, 5, 4)
    result = getattr(block, direction)(x)
    assert layer.initialised
    assert relative_error(result.mean((0, 2, 3)), torch.zeros(6), least_scale=1) <= tolerance(x.dtype)
    assert relative_error(result.var((0, 2, 3), correction=0), torch.ones(6)) <= tolerance(x.dtype)
    before = copy.deepcopy(layer.state_dict())
    weighted_sum(getattr(block, direction)(x + 1)).backward()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} changed after the first pass"


def test_a_recomputation_does_not_initialise_again():
    """In the first steps of training, parameters and gradients equal those of the twin, which never recomputes."""

    def steps(module, x):
        optimiser = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimiser.zero_grad()
            weighted_sum(module(x).square()).backward()
            optimiser.step()
        return [p.detach().clone() for p in module.parameters()]

    x = 5 + 3 * data(4, 6, 5, 4)
    inside = nn.Sequential(ActNorm(3), nn.Conv2d(3, 3, 1), nn.Tanh())  # a branch may hold one too
    chain = ReversibleSequential(ActNorm(6), AdditiveCoupling(inside), ActNorm(6)).double()
    assert_like_twin(chain, steps, x.requires_grad_(), depth=6)


def test_the_first_pass_may_run_without_gradients():
    layer = InvertibleModuleWrapper(ActNorm(6).double())
    with torch.no_grad():
        layer(5 + 3 * data(4, 6, 5, 4))
    assert layer._fn.initialised
    assert_like_twin(layer, backward, images(4, 6, 5, 4))


def test_the_first_pass_satisfies_a_check_of_the_inverse():
    layer = InvertibleModuleWrapper(ActNorm(6), check_inverse=tolerance(torch.float64)).double()
    assert_like_twin(layer, backward, (5 + 3 * data(4, 6, 5, 4)).requires_grad_())


def test_in_evaluation_nothing_is_initialised():
    layer = ActNorm(6).double().eval()
    x = data(4, 6, 5, 4)
    assert torch.equal(layer(x), x) and torch.equal(layer.inverse(x), x)
    assert not layer.initialised


def test_the_state_contains_whether_it_is_initialised():
    layer = ActNorm(6)
    layer(data(4, 6, 5, 4, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = ActNorm(6)
    restored.load_state_dict(torch.load(file))
    assert restored.initialised and copy.deepcopy(layer).initialised
    restored(5 + data(4, 6, 5, 4, dtype=torch.float32))
    assert torch.equal(restored.shift, layer.shift)


@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_a_constant_channel_keeps_its_scale(constant):
    layer = ActNorm(2)
    x = data(4, 2, 5, 4, dtype=torch.float32)
    x[:, 0] = constant
    y = layer(x)
    assert layer.log_scale[0] == 0 and layer.log_scale[1] != 0
    assert relative_error(y[:, 0], torch.zeros(4, 5, 4), least_scale=1) <= tolerance(x.dtype)


def test_a_channel_that_is_constant_up_to_rounding_keeps_its_scale():
    layer = ActNorm(2)
    x = data(4, 2, 5, 4, dtype=torch.float32)
    x[:, 0] = 1000
    x[0, 0, 0, 0] = torch.nextafter(torch.tensor(1000.0), torch.tensor(2000.0))
    layer(x)
    assert layer.log_scale[0] == 0 and layer.log_scale[1] != 0


def test_statistics_of_half_precision_inputs_are_computed_in_the_parameters_precision():
    x = (5 + data(4, 2, 5, 4, dtype=torch.float32)).bfloat16()
    layer, wanted = ActNorm(2), ActNorm(2)
    layer(x)
    wanted(x.float())
    assert torch.equal(layer.shift, wanted.shift) and torch.equal(layer.log_scale, wanted.log_scale)


def test_a_graph_from_before_the_initialisation_is_not_differentiated_wrongly():
    block = InvertibleModuleWrapper(ActNorm(6).double()).eval()
    loss = weighted_sum(block(images(4, 6, 5, 4)))
    block.train()(data(4, 6, 5, 4))
    with pytest.raises(RuntimeError, match="'log_scale' of shape .* was modified between forward and backward"):
        loss.backward()


def test_a_module_that_changes_its_parameters_at_every_pass_is_refused():
    class Restless(ActNorm):
        def forward(self, x):
            self.initialised = False
            return super().forward(x)

    block = InvertibleModuleWrapper(Restless(6).double())
    loss = weighted_sum(block(images(4, 6, 5, 4)))
    with pytest.raises(RuntimeError, match="'log_scale' of shape .* modified in every forward pass of its module"):
        loss.backward()
