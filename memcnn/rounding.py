"""How far apart two tensors are: see ``memcnn.engine.rounding``."""

from memcnn.engine.rounding import relative_error

__all__ = ["relative_error"]
