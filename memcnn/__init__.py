"""Memory-efficient reversible networks for PyTorch, and the means to verify them and to measure what they cost."""

from memcnn.models.additive import AdditiveCoupling
from memcnn.models.revop import InvertibleModuleWrapper, ReversibleBlock, ReversibleSequential

__version__ = "2.0.0.dev0"

__all__ = ["AdditiveCoupling", "InvertibleModuleWrapper", "ReversibleBlock", "ReversibleSequential", "__version__"]
