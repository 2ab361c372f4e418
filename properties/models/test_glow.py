"""Glow: a bijection at several scales, its likelihood, and its samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bench.reference import NegativeLogLikelihood
from memcnn.models.glow import Glow, bits_per_dimension, glow_cifar
from memcnn.testing.tolerances import relative_error, tolerance
from properties.support.reference import assert_flat_in_depth, assert_laws
from properties.support.twin import assert_like_twin, data


def small(depth: int = 1, scales: int = 2, size: int = 4, **options) -> Glow:
    """Return a flow with random parameters. A new flow has couplings and predictions without effect."""
    flow = Glow((1, size, size), scales, depth, hidden=4, **options)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow


@settings(max_examples=2)
@given(st.integers(1, 2), st.integers(0, 2**16))
def test_the_flow_meets_the_laws(scales, seed):
    torch.manual_seed(seed)
    assert_laws(small(1, scales), data(3, 1, 4, 4, dtype=torch.float32), laws=("inverse", "log_det"), seed=seed)


def test_the_likelihood_trains_as_its_twins():
    def program(net, x):
        y = net(x)
        y.sum().backward()
        return y

    assert_like_twin(NegativeLogLikelihood(small(2)).double(), program, data(3, 1, 4, 4), depth=12)


def test_the_flow_leaves_state_as_a_plain_step_does():
    assert_laws(small(1), data(3, 1, 4, 4, dtype=torch.float32), laws=("gradients", "state"), finite_differences=False)


def test_the_density_integrates_to_one():
    """The integral is estimated by importance sampling of images of four values, from a wide normal distribution."""
    torch.manual_seed(0)
    flow = small(1, scales=1, size=2, bound=0.5).double().eval()
    nn.init.constant_(dict(flow.named_parameters())["scales.0.1._fn.log_scale"], 0.3)  # adds 1.2 to log|det|
    deviation = 2.0
    x = deviation * torch.randn(40_000, 1, 2, 2, dtype=torch.float64)
    drawn = torch.distributions.Normal(0.0, deviation).log_prob(x).flatten(1).sum(1)
    with torch.no_grad():
        weights = (flow.log_prob(x) - drawn).exp()
    error = weights.std().item() / len(weights) ** 0.5
    assert error < 0.05
    assert weights.mean().item() == pytest.approx(1, abs=5 * error)


def test_memory_is_flat_in_depth():
    assert_flat_in_depth(lambda depth: NegativeLogLikelihood(small(depth, scales=1)), torch.randn(16, 1, 4, 4))


def test_bits_per_dimension_of_a_new_flow_have_the_known_mean():
    """A new flow maps x to x - 1/2, up to order and orthogonal matrices, which gives the mean in closed form."""
    torch.manual_seed(0)
    images = torch.randint(256, (512, 1, 4, 4), dtype=torch.uint8)
    flow = Glow((1, 4, 4), 2, 1, 4).eval()
    expected = math.log2(256) + (0.5 / 12 + 0.5 * math.log(2 * math.pi)) / math.log(2)
    with torch.no_grad():
        assert bits_per_dimension(flow, images).item() == pytest.approx(expected, abs=0.01)
        for levels in (32, 2):
            bits = bits_per_dimension(flow, images, levels=levels).item()
            assert bits == pytest.approx(expected - 8 + math.log2(levels), abs=0.01)


def test_a_few_training_steps_lower_the_bits_per_dimension():
    torch.manual_seed(0)
    images = (40 * torch.rand(64, 1, 1, 1) + torch.arange(16).view(1, 1, 4, 4)).to(torch.uint8)
    flow = Glow((1, 4, 4), 2, 2, 8)
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = bits_per_dimension(flow, images)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5


def test_temperature_scales_the_latent_values():
    flow = small(1).eval()
    samples = [flow.sample(3, t, torch.Generator().manual_seed(1)) for t in (0.0, 0.5, 1.0)]
    with torch.no_grad():
        latents = [flow(x) for x in samples]
    assert samples[0].shape == (3, 1, 4, 4)
    assert latents[0].abs().max() <= 1e-4
    assert relative_error(2 * latents[1], latents[2]) <= tolerance(torch.float32, depth=6)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"2\*\*3 must divide height and width of the images: got \(3, 8, 12\)"):
        Glow((3, 8, 12), 3)
    with pytest.raises(ValueError, match=r"made for images \(N, 1, 4, 4\): got \(2, 1, 8, 8\)"):
        small()(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"latent values must have the shape \(N, 16\): got \(2, 15\)"):
        small().inverse(torch.zeros(2, 15))


def test_the_cifar_model_has_three_scales():
    flow = glow_cifar(depth=1, hidden=4)
    assert flow.parts == [(6, 16, 16), (12, 8, 8), (48, 4, 4)]
    with torch.no_grad():
        assert flow(torch.rand(2, 3, 32, 32)).shape == (2, 3072)
