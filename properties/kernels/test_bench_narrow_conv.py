"""``bench.narrow_conv`` finds the layers of the networks, and adds up what the chosen plans save."""

from collections import Counter

import pytest
import torch

from bench import narrow_conv


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("resnet32", {(5, 16, 16, 32, 32): 10, (5, 32, 32, 16, 16): 9, (5, 64, 64, 8, 8): 9}),
        ("revnet38", {(5, 16, 16, 32, 32): 12, (5, 64, 64, 16, 16): 1, (5, 32, 32, 16, 16): 8}),
    ],
)
def test_layers_of_a_network(network, layers):
    assert narrow_conv.shapes(network, batch=5) == layers


def test_savings_count_only_chosen_layers():
    first, second = (5, 16, 16, 32, 32), (5, 64, 64, 8, 8)
    table = [
        {"shape": first, "cuDNN, us": 72.0, "saved": 62.0},
        {"shape": second, "cuDNN, us": 12.0, "saved": 0.0},
    ]
    (line,) = narrow_conv.savings(table, {"net": Counter({first: 10, second: 5})}).to_dict("records")
    assert line["layers"] == 15
    assert line["cuDNN, ms a step"] == pytest.approx(0.78)
    assert line["as chosen, ms a step"] == pytest.approx(0.16)
    assert line["saved, ms a step"] == pytest.approx(0.62)


def test_error_is_relative_to_float64():
    x, gradient = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    weight = torch.zeros(16, 16, 3, 3, requires_grad=True)
    (right,) = torch.autograd.grad(torch.nn.functional.conv2d(x, weight, padding=1), weight, gradient)
    assert narrow_conv.relative_error(right, gradient, x) < 1e-6
    assert narrow_conv.relative_error(1.5 * right, gradient, x) == pytest.approx(0.5, rel=1e-4)


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert narrow_conv.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        narrow_conv.main(["--networks", "resnet33"])
    assert "got resnet33, wanted some of resnet32" in capsys.readouterr().err
