"""Memory-efficient reversible networks for PyTorch, and the means to verify them and to measure what they cost."""

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.affine import AffineAdapterExp, AffineAdapterNaive, AffineAdapterSigmoid, AffineCoupling
from memcnn.models.revop import InvertibleModuleWrapper, ReversibleBlock, ReversibleSequential, create_coupling

__version__ = "2.0.0.dev0"

__all__ = ["AdditiveCoupling", "AffineAdapterExp", "AffineAdapterNaive", "AffineAdapterSigmoid", "AffineCoupling",
           "InvertibleModuleWrapper", "ReversibleBlock", "ReversibleSequential", "__version__", "create_coupling"]
