"""``bench.narrow_conv`` finds the convolutions of the networks, and adds up what the chosen plans save."""

from collections import Counter

import pytest
import torch

from bench import narrow_conv
from memcnn.kernels.operations import OPERATIONS


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("resnet32", {(5, 16, 16, 32, 32): (10, 10), (5, 32, 32, 16, 16): (9, 9), (5, 64, 64, 8, 8): (9, 9)}),
        ("revnet38", {(5, 16, 16, 32, 32): (24, 12), (5, 64, 64, 16, 16): (1, 1), (5, 32, 32, 16, 16): (16, 8)}),
    ],
)
def test_convolutions_of_a_training_step(network, layers):
    """Outputs within reversible blocks are computed twice."""
    found = narrow_conv.cases(network, batch=5)
    for shape, (outputs, gradients) in layers.items():
        assert [found.pop((operation.name, shape)) for operation in OPERATIONS] == [outputs, gradients, gradients]
    assert not found


def test_savings_count_only_chosen_plans():
    first, second = ("output", (5, 16, 16, 32, 32)), ("weight gradient", (5, 16, 16, 32, 32))
    table = [
        {"case": first, "cuDNN, us": 72.0, "saved": 62.0},
        {"case": second, "cuDNN, us": 12.0, "saved": 0.0},
    ]
    (line,) = narrow_conv.savings(table, {"net": Counter({first: 10, second: 5})}).to_dict("records")
    assert line["convolutions"] == 15
    assert line["cuDNN, ms a step"] == pytest.approx(0.78)
    assert line["as chosen, ms a step"] == pytest.approx(0.16)
    assert line["saved, ms a step"] == pytest.approx(0.62)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_error_is_relative_to_float64(operation):
    first, second = narrow_conv.operands(operation, (2, 16, 32, 4, 5), torch.device("cpu"), torch.float32)
    right = operation.library(first, second)
    assert narrow_conv.relative_error(operation, right, first, second) < 1e-6
    assert narrow_conv.relative_error(operation, 1.5 * right, first, second) == pytest.approx(0.5, rel=1e-4)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert narrow_conv.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        narrow_conv.main(["--networks", "resnet33"])
    assert "got resnet33, wanted some of resnet32" in capsys.readouterr().err
