"""Means to prove a reversible block right and to measure what it costs.

`check_all(module, *inputs)` tests any module with ``forward`` and ``inverse``; the other checks are its parts.
"""

from memcnn.testing.checks import check_all
from memcnn.testing.laws.gradients import check_gradients
from memcnn.testing.laws.inverse import check_inverse
from memcnn.testing.laws.log_det import check_log_det
from memcnn.testing.laws.memory import check_memory
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.state import check_state

__all__ = ["Report", "Result", "check_all", "check_gradients", "check_inverse", "check_log_det", "check_memory",
           "check_state"]
