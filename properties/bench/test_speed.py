"""The floor of a training step is counted right, and the table says what was measured."""

import pytest
import torch

from bench import measure, speed
from bench.speed import UPDATE_BYTES, Work, work
from memcnn.models.resnet import MODELS, resnet32
from memcnn.testing.prediction import step_flops

BATCH = 2


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64)


@pytest.mark.parametrize("network", ["resnet32", "revnet38"])
def test_operations_are_those_of_torchs_own_counter(network):
    assert work(network, batch=BATCH, precision="float32").flops == step_flops(MODELS[network], batch)


def test_bytes_are_those_of_each_convolution_and_of_the_update():
    """The first convolution of ResNet-32 by hand: images, weights and result once each."""
    counted = work("resnet32", batch=BATCH, precision="float32")
    images, weights, result = BATCH * 3 * 32 * 32, 16 * 3 * 3 * 3, BATCH * 16 * 32 * 32
    assert counted.parts[0] == (2 * result * 27, 4 * (images + weights + result))
    assert counted.update_bytes == UPDATE_BYTES * sum(p.numel() for p in resnet32().parameters())
    halved = work("resnet32", batch=BATCH, precision="bf16")
    assert counted.parts[0][1] == 2 * halved.parts[0][1]


def test_the_floor_takes_the_slower_of_arithmetic_and_memory_for_each_part():
    step = Work(parts=((100, 10), (10, 100)), update_bytes=7)
    assert step.floor_seconds(1.0, 1.0) == 100 + 100 + 7
    assert step.floor_seconds(1.0, 1e30) == pytest.approx(110)
    assert step.floor_seconds(1e30, 1.0) == pytest.approx(117)


def test_the_report_has_a_row_for_each_execution_with_its_distance(tmp_path, monkeypatch, capsys):
    ticks = iter(range(10**6))
    monkeypatch.setattr(measure, "clock", lambda: next(ticks))  # between two looks at it one second passes
    monkeypatch.setattr(measure, "source", measure.source)
    monkeypatch.setattr(speed, "ceilings", lambda device, execution: (1e9, 1e12))
    file = tmp_path / "speed.md"
    arguments = ["--networks", "resnet32", "--batch", str(BATCH), "--device", "cpu", "--out", str(file)]
    assert speed.main(arguments) == 0
    text = file.read_text()
    assert text in capsys.readouterr().out
    assert f"python -m bench.speed {' '.join(arguments)}" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| resnet32")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    floor = work("resnet32", batch=BATCH, precision="float32").floor_seconds(1e9, 1e12)
    assert cells[:3] == ["resnet32", "float32", "1,000 (1,000 to 1,000)"]
    assert cells[-1] == f"{1 / floor:.1f}"


def test_an_unknown_network_is_refused(capsys):
    with pytest.raises(SystemExit):
        speed.main(["--networks", "resnet33"])
    assert "got resnet33, wanted some of resnet32" in capsys.readouterr().err
