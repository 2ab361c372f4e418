"""The relative error between two tensors, from ``memcnn.engine.rounding``."""

from memcnn.engine.rounding import relative_error

__all__ = ["relative_error"]
