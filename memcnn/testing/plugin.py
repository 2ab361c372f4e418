"""A pytest plugin: ``pytest -p memcnn.testing.plugin`` gives every test the fixture ``assert_reversible``."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from memcnn.testing.checks import check_all
from memcnn.testing.laws.result import Report


@pytest.fixture(scope="session")
def assert_reversible() -> Callable[..., Report]:
    """``assert_reversible(module, *inputs)`` fails with a table unless every law holds; options as for ``check_all``.

    Its scope is the session, so that it also works beside ``@given`` of hypothesis. Outside of pytest, call
    ``check_all`` and look at ``passed``.
    """

    def check(module: nn.Module, *inputs: Tensor, **options: Any) -> Report:
        __tracebackhide__ = True
        report = check_all(module, *inputs, **options)
        if not report.passed:
            pytest.fail(f"{report.summary()}\n\n{report}", pytrace=False)
        return report

    return check
