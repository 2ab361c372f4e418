"""Checks of a reversible block against its laws, such as inverse(forward(x)) = x.

`check_all(module, *inputs)` tests any module with ``forward`` and ``inverse``. The other checks test one law each;
`check_training` and `check_copies` are not part of `check_all`. Every law is implemented here alone: ``properties/``
draws networks for the checks, and ``python -m memcnn.verify`` runs them on a user's module.
"""

from memcnn.testing.adapters import Inverted, WithLogDet
from memcnn.testing.checks import check_all
from memcnn.testing.laws.copies import check_copies
from memcnn.testing.laws.gradients import check_gradients
from memcnn.testing.laws.inverse import check_inverse
from memcnn.testing.laws.log_det import check_log_det
from memcnn.testing.laws.memory import check_memory
from memcnn.testing.laws.result import Report, Result
from memcnn.testing.laws.state import check_state
from memcnn.testing.laws.training import check_training

__all__ = [
    "Inverted",
    "Report",
    "Result",
    "WithLogDet",
    "check_all",
    "check_copies",
    "check_gradients",
    "check_inverse",
    "check_log_det",
    "check_memory",
    "check_state",
    "check_training",
]
