"""The fixture that makes every run take milliseconds."""

import pytest

from properties.training.runs import tiny_training


@pytest.fixture(scope="module")
def tiny_runs():
    """Every run is a tiny one: model resnet32, data "generated", recipe `runs.RECIPE`."""
    with tiny_training():
        yield
