"""``bench.speed --kernels`` lists the kernels of a training step, with their calls and times."""

from contextlib import suppress
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.autograd import DeviceType

from bench.speed import __main__ as speed
from bench.speed import floor, kernels, steps, timing
from memcnn.training.execution import Execution
from properties.devices import DEVICES

COUNTED = ("aten::native_batch_norm", "aten::_fused_sgd_")


def event(key: str, count: int, device: DeviceType, *, cpu: float = 0.0, gpu: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(
        key=key, count=count, device_type=device, self_cpu_time_total=cpu, self_device_time_total=gpu
    )


def test_on_a_gpu_kernels_are_listed_and_not_the_operators_that_launch_them():
    events = [
        event("aten::conv2d", 10, DeviceType.CPU, cpu=500.0, gpu=80.0),
        event("small", 10, DeviceType.CUDA, gpu=20.0),
        event("x" * 2000 + "1", 20, DeviceType.CUDA, gpu=60.0),
        event("x" * 2000 + "2", 10, DeviceType.CUDA, gpu=30.0),
    ]
    table = kernels.rows(events, 10, on_gpu=True)
    assert table.to_dict("list") == {"kernel": ["x" * kernels.LONGEST, "small"], "calls": [3.0, 1.0], "us": [9.0, 2.0]}
    on_cpu = kernels.rows(events, 10, on_gpu=False)
    assert on_cpu.to_dict("list") == {"kernel": ["aten::conv2d"], "calls": [1.0], "us": [50.0]}


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_writes_the_calls_of_a_step(tmp_path, monkeypatch, capsys, device):
    monkeypatch.setattr(floor, "ceilings", lambda device, execution: (1e9, 1e12))
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    arguments = ["--networks", "resnet32", "--batch", "2", "--device", device, "--seconds", "0.01", "--kernels"]
    if device == "cuda":
        monkeypatch.setattr(steps, "ON_GPU", ())  # float32 alone
    assert speed.main([*arguments, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / kernels.FILE)
    assert set(table["network"]) == {"resnet32"} and set(table["execution"]) == {"float32"}
    assert table["us"].is_monotonic_decreasing and (table["us"] > 0).any()
    if device == "cpu":
        calls = dict(zip(table["kernel"], table["calls"], strict=True))
        assert [calls[name] for name in COUNTED] == [33, 1]
    page = (tmp_path / kernels.PAGE).read_text()
    assert page in capsys.readouterr().out
    assert "## resnet32: float32, batch 2" in page and f"`{table['kernel'][0]}`" in page
    assert f"| sum | {table['calls'].sum():,.4g} |" in " ".join(page.split())


def test_the_steps_of_a_group_are_counted_once_each():
    """A group of three runs makes three steps in a round."""
    x = torch.ones(3)

    def run(count: int) -> None:
        for _ in range(3 * count):
            x.cos()

    table = kernels.profiled(run, steps.Way(steps.PLAIN.execution, 3), torch.device("cpu"))
    assert table.set_index("kernel")["calls"]["aten::cos"] == 1


def test_steps_that_the_engine_watches_for_drift_do_not_count():
    """Each of them makes about three times as many calls."""
    lengths = iter([1, 9, 3, 1, 9, 9])
    x = torch.ones(3)

    def run(count: int) -> None:
        for _ in range(next(lengths)):
            x.cos()

    table = kernels.profiled(run, steps.PLAIN, torch.device("cpu"))
    assert table.set_index("kernel")["calls"]["aten::cos"] == 1
    assert not list(lengths)


CAPTURED = steps.Way(Execution(graph=True))


@pytest.mark.parametrize(
    ("way", "lengths", "calls"),
    [
        (steps.PLAIN, [9, 3, 0, 9, 9], 3),  # an empty profile is no step
        (CAPTURED, [9, 9, 5, 9, 0], 9),  # of captured steps, an incomplete profile is none either
    ],
)
def test_profiles_that_lost_calls_do_not_count(monkeypatch, way, lengths, calls):
    tables = iter([pd.DataFrame({"kernel": ["k"], "calls": [length], "us": [2.0]})[:length] for length in lengths])
    monkeypatch.setattr(kernels, "profiled_step", lambda run, group, device: next(tables))
    assert kernels.profiled(lambda count: None, way, torch.device("cpu"))["calls"].tolist() == [calls]


def test_the_profiler_starts_before_any_step_is_captured(tmp_path, monkeypatch):
    order = []

    def step_of(*_: object, **__: object) -> None:
        order.append("step")
        raise KeyboardInterrupt

    monkeypatch.setattr(floor, "ceilings", lambda device, execution: (1e9, 1e12))
    monkeypatch.setattr(kernels, "prepare", lambda device: order.append("profiler"))
    monkeypatch.setattr(steps, "step_of", step_of)
    arguments = ["--networks", "resnet32", "--kernels", "--device", "cpu", "--out", str(tmp_path)]
    with suppress(KeyboardInterrupt, SystemExit):
        speed.main(arguments)
    assert order == ["profiler", "step"]


def test_a_profiler_that_records_nothing_is_reported_and_the_times_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(floor, "ceilings", lambda device, execution: (1e9, 1e12))
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 1)
    monkeypatch.setattr(kernels, "rows", lambda events, steps, on_gpu: pd.DataFrame(columns=["kernel", "calls", "us"]))
    arguments = ["--networks", "resnet32", "--batch", "2", "--device", "cpu", "--seconds", "0.01", "--kernels"]
    assert speed.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "resnet32: the profiler recorded no kernel in 5 steps; try again" in capsys.readouterr().err
    assert len(pd.read_csv(tmp_path / "speed.csv")) == 1 and not (tmp_path / kernels.FILE).exists()


def test_a_second_measurement_replaces_the_rows_of_its_case(tmp_path):
    case = {"network": "revnet38", "execution": "float32", "group": 1, "batch": 2}
    for names, group in (("ab", 1), ("c", 1), ("d", 3)):
        rows = pd.DataFrame({"kernel": list(names), "calls": 1.0, "us": 2.0}).assign(**case | {"group": group})
        kernels.add(tmp_path, rows)
    table = pd.read_csv(tmp_path / kernels.FILE)
    assert list(zip(table["group"], table["kernel"], strict=True)) == [(1, "c"), (3, "d")]
    page = (tmp_path / kernels.PAGE).read_text()
    assert "## revnet38: float32, 3 runs together, batch 2" in page


def test_small_kernels_are_shown_together():
    count = kernels.SHOWN + 2
    table = pd.DataFrame({"kernel": [200 * "k" + f"{i}" for i in range(count)], "calls": 1.0, "us": 10.0})
    shown = kernels.shown(table)
    assert shown["kernel"][0] == f"`{kernels.WIDTH * 'k'}`"
    assert list(shown["kernel"])[-2:] == ["2 others", "sum"]
    assert list(shown["calls"])[-2:] == ["2", str(count)] and list(shown["us"])[-2:] == ["20", f"{10 * count}"]


def test_a_file_that_cannot_be_extended_is_reported_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / kernels.FILE).write_text("network,us\nresnet32,1\n")
    with pytest.raises(SystemExit):
        speed.main(["--networks", "resnet32", "--kernels", "--device", "cpu", "--out", str(tmp_path)])
    assert "missing columns batch, calls, execution, group, kernel" in capsys.readouterr().err
