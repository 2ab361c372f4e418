"""Tests of ``bench.speed``: the floor of a training step, the timing of groups, and the rows of the table."""

from contextlib import contextmanager
from itertools import groupby

import pandas as pd
import pytest
import torch

from bench import measure
from bench.speed import __main__ as speed
from bench.speed import floor, steps, timing
from bench.speed import text as speed_text
from bench.speed.floor import UPDATE_BYTES, Work, work
from memcnn.memory import step_flops
from memcnn.models.resnet import MODELS, CifarResNet, basic_branch, resnet32
from memcnn.training.execution import Execution
from properties.support.capture import Stream, graphs_on_cpu

BATCH = 2


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(BATCH, 3, 32, 32), torch.zeros(BATCH, dtype=torch.int64)


@pytest.mark.parametrize("network", ["resnet32", "revnet38"])
def test_operations_are_those_of_torchs_own_counter(network):
    assert work(network, batch=BATCH, precision="float32").flops == step_flops(MODELS[network], batch)


def test_bytes_are_those_of_each_convolution_and_of_the_update():
    """The first convolution of CifarResNet-32 by hand: images, weights and result once each."""
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
    monkeypatch.setattr(measure, "clock", lambda: next(ticks))  # one second passes between two calls
    monkeypatch.setattr(measure, "source", measure.source)
    monkeypatch.setattr(floor, "ceilings", lambda device, execution: (1e9, 1e12))
    arguments = ["--networks", "resnet32", "--batch", str(BATCH), "--device", "cpu", "--out", str(tmp_path)]
    assert speed.main(arguments) == 0
    text = (tmp_path / "speed.md").read_text()
    assert text in capsys.readouterr().out
    assert f"python -m bench.speed {' '.join(arguments)}" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| resnet32")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    floor_seconds = work("resnet32", batch=BATCH, precision="float32").floor_seconds(1e9, 1e12)
    assert cells[:5] == ["resnet32", "float32", "1", str(BATCH), "1,000 (1,000 to 1,000)"]
    assert cells[-1] == f"{1 / floor_seconds:.1f}"
    row = speed_text.read(tmp_path).iloc[0]
    assert (row.ms, row.to_plain, str(row.rounds), row.steps, row.device_type) == (1000, 1, cells[5], 1, "cpu")
    assert row.floor_ms == pytest.approx(1e3 * floor_seconds, rel=1e-5) and row.clock == "wall" and row.torch in text


def test_the_variants_on_a_cpu_are_shown_with_the_network_that_they_were_timed_for(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "cpu_variants", lambda network, *, batch: {"as it is": None, "bfloat16": None})
    monkeypatch.setattr(timing, "timed", lambda functions, device, limit: (pd.DataFrame(0.1, range(3), functions), {}))
    setup = speed.Setup(torch.device("cpu"), BATCH, {}, {})
    variants = speed.variants_table("revnet38", setup)
    text = speed_text.page(measured("resnet110", 1.0), "command", "floor", variants)
    _, _, section = text.partition("## Variants of the step on this CPU")
    assert section.count("revnet38") == 2 and "resnet32" not in section


def measured(network: str, ms: float, **more) -> pd.DataFrame:
    """Return a row of speed.csv as if it had been measured."""
    row = dict.fromkeys(speed_text.COLUMNS, 1.0)
    words = {
        "execution": "float32",
        "device_type": "cpu",
        "device": "a processor",
        "clock": "cpu",
        "torch": "2.13.0",
        "cuda": None,
        "cudnn": None,
        "python": "3.11.7",
        "commit": "0" * 40,
        "clean": True,
        "date": "2026-11-27",
    }
    return pd.DataFrame(
        [{**row, **words, "network": network, "group": 1, "batch": 100, "rounds": 3, "steps": 1, "ms": ms, **more}]
    )


def test_new_rows_are_added_to_earlier_ones_and_replace_those_of_the_same_case(tmp_path):
    speed_text.add(tmp_path, measured("revnet38", 5.0))
    speed_text.add(tmp_path, measured("revnet38", 6.0, group=4))
    speed_text.add(tmp_path, measured("resnet32", 2.0, date="2026-11-28"))
    table = speed_text.add(tmp_path, measured("revnet38", 4.0))
    assert list(zip(table.network, table.group, table.ms, strict=True)) == [
        ("resnet32", 1, 2.0),
        ("revnet38", 4, 6.0),
        ("revnet38", 1, 4.0),
    ]
    lines = speed_text.origins(table)
    assert [line[:30] for line in lines] == ["resnet32: 2026-11-28, a proces", "revnet38: 2026-11-27, a proces"]
    assert "this process's CPU time" in lines[0] and "commit 000000000000" in lines[0]
    table = pd.concat([table, measured("resnet110", 9.0, execution="bf16, graph", gflop_per_second=700_000.4)])
    assert [line.partition(" in a matrix")[0] for line in speed_text.ceilings(table)] == [
        "Ceilings in float32 (resnet32, revnet38): 1 GFLOP/s",
        "Ceilings in bf16 (resnet110): 700,000 GFLOP/s",
    ]


@pytest.fixture
def captured_on_cpu(monkeypatch):
    """Capture graphs on the CPU. Yield the graphs, and the numbers of the streams in the order of their use."""
    queued = []
    with graphs_on_cpu(monkeypatch) as graphs:
        made = []

        def new_stream():
            made.append(Stream())
            return made[-1]

        use = torch.cuda.stream

        @contextmanager
        def on(stream):
            queued.append(made.index(stream))
            with use(stream):
                yield

        monkeypatch.setattr(torch.cuda, "Stream", new_stream)
        monkeypatch.setattr(torch.cuda, "stream", on)
        yield graphs, queued


def test_a_group_interleaves_captured_steps_of_separate_runs_on_separate_streams(captured_on_cpu, monkeypatch):
    graphs, queued = captured_on_cpu
    models = []
    monkeypatch.setitem(MODELS, "resnet32", lambda: models.append(small_resnet()) or models[-1])
    torch.manual_seed(0)
    run = steps.step_of("resnet32", steps.Way(Execution(graph=True), 3), batch=BATCH, device=torch.device("cpu"))
    run(1)
    assert len(graphs) == len(models) == 3
    assert [number for number, _ in groupby(queued)] == [0, 1, 2]  # a capture enters its run's stream once more
    assert len({id(graph.stream) for graph in graphs}) == 3
    first = [model.stem[0].weight.detach().clone() for model in models]
    assert not torch.equal(first[0], first[1])
    queued.clear()
    run(2)
    assert queued == [0, 1, 2] * 2 and len(graphs) == 3
    assert all(not torch.equal(model.stem[0].weight, before) for model, before in zip(models, first, strict=True))


def small_resnet() -> CifarResNet:
    """Return a ResNet of 8 channels. With fewer, oneDNN's strided 1x1 convolutions write out of bounds."""
    return CifarResNet(basic_branch, units=(1, 1), channels=(8, 8, 16), num_classes=10)


def test_the_time_of_a_group_is_that_of_one_of_its_steps(monkeypatch, capsys):
    monkeypatch.setattr(
        timing,
        "timed",
        lambda steps, device, limit: (
            pd.DataFrame({way: [0.004 * (2 if way.group > 1 else 1)] * 3 for way in steps}),
            dict.fromkeys(steps, 7),
        ),
    )
    ways = [steps.PLAIN, steps.Way(Execution(graph=True)), steps.Way(Execution(graph=True), 4)]
    cpu = torch.device("cpu")
    setup = speed.Setup(cpu, BATCH, {"float32": (1e12, 1e12)}, speed.origin(cpu, "wall"))
    table = speed.measured_rows("resnet32", dict.fromkeys(ways, lambda count: None), setup)
    assert list(table.group) == [1, 1, 4] and list(table.ms) == [4.0, 4.0, 2.0] and set(table.steps) == {7}
    assert list(table.to_plain) == [1, 1, 0.5]


def test_on_a_gpu_a_round_queues_as_many_steps_as_fill_its_time(monkeypatch):
    now, calls = [0.0], []

    def run(count: int) -> None:
        calls.append(count)
        now[0] += 0.004 * count

    monkeypatch.setattr(measure, "clock", lambda: now[0])
    times, counts = timing.timed({"way": run}, torch.device("cuda"))
    assert counts == {"way": round(timing.ROUND_SECONDS / 0.004)} == {"way": calls[-1]}
    assert times["way"].tolist() == pytest.approx([0.004] * timing.MOST_ROUNDS)


FASTEST = [
    "bf16, graph, compile, narrow-convolutions",
    "bf16, graph, compile",
    "bf16, graph, compile, deterministic",
]
TRIES = [f"{FASTEST[0]}, {names}" for names in ("fused-norms", "combine-kernels", "fused-norms, combine-kernels")]


@pytest.mark.parametrize(
    ("options", "on", "wanted"),
    [
        ("--fast", "cuda", FASTEST),
        ("--fast", "cpu", ["float32"]),
        ("--fast --group 4", "cuda", [*FASTEST, FASTEST[0]]),
        ("--fast --tries", "cuda", [FASTEST[0], *TRIES]),
        ("--fast --tries --group 3", "cuda", 2 * [FASTEST[0], *TRIES]),
        ("--fast --tries", "cpu", ["float32"]),
        (
            "--group 2",
            "cuda",
            [
                "float32",
                "tf32",
                "bf16",
                "float32, graph",
                "tf32, graph",
                "bf16, graph",
                "float32, graph",
                "tf32, graph",
                "bf16, graph",
            ],
        ),
        ("--compile", "cpu", ["float32", "float32, compile"]),
    ],
)
def test_the_options_choose_the_ways_that_are_measured(options, on, wanted, monkeypatch):
    monkeypatch.setattr("memcnn.training.execution.has_triton", lambda: True)
    ways = speed.ways_of(speed.build_parser().parse_args(options.split()), torch.device(on))
    assert [str(way.execution) for way in ways] == wanted
    assert all(way.execution.graph for way in ways if way.group > 1)
