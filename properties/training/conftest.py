"""Fixtures of the tests of training: runs that take milliseconds, and small data sets."""

import pytest

from memcnn import data
from properties.support.cifar_files import write_fake
from properties.support.runs import tiny_training


@pytest.fixture(scope="module")
def tiny_runs():
    """Replace every run by a tiny one: model resnet32, data "generated", recipe ``runs.RECIPE``."""
    with tiny_training():
        yield


@pytest.fixture
def no_network(monkeypatch):
    """Let every download fail."""

    def refuse(*arguments, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def small_source(monkeypatch):
    """Return a function that writes a small CIFAR-10, and makes its checksums the official ones for this test."""

    def make(folder, **options):
        original = data.DATASETS["cifar10"]
        sums = write_fake(folder, original, **options)
        train = [[name, sums[name]] for name, _ in original.train_list]
        test = [[name, sums[name]] for name, _ in original.test_list]
        meta = {**original.meta, "md5": sums[original.meta["filename"]]}
        source = type("CIFAR10", (original,), {"train_list": train, "test_list": test, "meta": meta})
        monkeypatch.setitem(data.DATASETS, "cifar10", source)
        return sums

    return make
