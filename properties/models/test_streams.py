"""The tensor that enters a chain is float32 under autocast; one of a wrong shape is refused with a clear message."""

import warnings

import pytest
import torch

from memcnn.models.glow import Glow, bits_per_dimension
from memcnn.models.irevnet import IRevNet
from memcnn.models.momentum import momentum_resnet
from memcnn.models.reformer import ReversibleLM
from memcnn.models.reversible_unet import InvertibleUNet, ReversibleUNet
from memcnn.models.revop import ReversibleSequential


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: momentum_resnet(units=(1, 1)), (2, 3, 8, 8)),
        (lambda: ReversibleUNet(1, 2, (4, 8), 1), (2, 1, 8, 8)),
        (lambda: InvertibleUNet(8, 2, 1), (2, 8, 8, 8)),
    ],
    ids=["momentum", "unet", "invertible unet"],
)
def test_streams_are_float32_under_autocast(make, shape):
    net, seen = make(), []
    for chain in [part for part in net.modules() if isinstance(part, ReversibleSequential)]:
        chain.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16):
        warnings.simplefilter("error")  # a bfloat16 stream warns
        net(torch.randn(shape)).float().square().mean().backward()
    assert len(seen) >= 2 and set(seen) == {torch.float32}


FLOW = Glow((3, 4, 4), 1, 1, 4)
LM = ReversibleLM(8, 1, 8, 2, context=4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: IRevNet((1,))(torch.rand(2, 1, 8, 8)), ValueError, r"takes \(N, 3, H, W\): got \(2, 1, 8, 8\)"),
        (lambda: IRevNet((1,))(torch.rand(3, 8, 8)), ValueError, r"takes \(N, 3, H, W\): got \(3, 8, 8\)"),
        (lambda: ReversibleUNet(1, 2, dims=3)(torch.rand(1, 1, 8, 8)), ValueError, r"takes \(N, 1, D1, D2, D3\): got"),
        (
            lambda: InvertibleUNet(8, 2)(torch.rand(1, 4, 8, 8)),
            ValueError,
            r"takes \(N, 8, D1, D2\): got \(1, 4, 8, 8\)",
        ),
        (lambda: LM(torch.zeros(3, dtype=torch.int64)), ValueError, r"takes \(N, T\): got \(3,\)"),
        (lambda: LM.generate(torch.zeros(1, 0, dtype=torch.int64), 1), ValueError, r"T of at least 1.*: got \(1, 0\)"),
        (lambda: FLOW.sample(1, -1.0), ValueError, "temperature must be at least 0, .*: got -1.0"),
        (
            lambda: bits_per_dimension(FLOW, torch.rand(1, 3, 4, 4)),
            TypeError,
            "images must be uint8.*: got torch.float32",
        ),
        (
            lambda: bits_per_dimension(FLOW, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), levels=100),
            ValueError,
            "levels must be a power of two from 2 to 256: got 100",
        ),
        (
            lambda: bits_per_dimension(FLOW, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), levels=1),
            ValueError,
            "levels must be a power of two from 2 to 256: got 1",
        ),
    ],
)
def test_wrong_arguments_are_refused_with_the_wanted_ones(call, error, message):
    with pytest.raises(error, match=message):
        call()
