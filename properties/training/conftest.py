"""The fixture that makes every run take milliseconds."""

import pytest

from memcnn import data as cifar_data
from memcnn.models.resnet import MODELS
from memcnn.training import loop
from properties.training import runs


@pytest.fixture(scope="module")
def tiny_runs():
    """Every run is a tiny one: model resnet32, data "generated", recipe `runs.RECIPE`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "resnet32", runs.tiny)
        patch.setattr(cifar_data, "generate", lambda num_classes: runs.DATA)
        patch.setattr(loop, "EVALUATION_BATCH", 20)
        yield
