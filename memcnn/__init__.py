"""Memory-efficient reversible networks for PyTorch, with tools that verify them and measure their cost."""

from memcnn import needs  # isort: split

needs.check()  # before the first import of torch

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.affine import AffineAdapterExp, AffineAdapterNaive, AffineAdapterSigmoid, AffineCoupling
from memcnn.models.flows import ActNorm, InvertibleConv1x1
from memcnn.models.rearrange import ChannelPermutation, DepthToSpace, SpaceToDepth
from memcnn.models.reversible_stack import to_reversible
from memcnn.models.revop import (
    InvertibleModuleWrapper,
    ReversibleBlock,
    ReversibleSequential,
    create_coupling,
    is_invertible_module,
)
from memcnn.weights import convert_optimizer_state, convert_state_dict, load_trained

__version__ = "2.0.0.dev0"

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineAdapterExp",
    "AffineAdapterNaive",
    "AffineAdapterSigmoid",
    "AffineCoupling",
    "ChannelPermutation",
    "DepthToSpace",
    "InvertibleConv1x1",
    "InvertibleModuleWrapper",
    "ReversibleBlock",
    "ReversibleSequential",
    "SpaceToDepth",
    "__version__",
    "convert_optimizer_state",
    "convert_state_dict",
    "create_coupling",
    "is_invertible_module",
    "load_trained",
    "to_reversible",
]
