"""Tests of the benchmark suites: the subjects do equal work, take turns, and are measured correctly."""

import dataclasses
import gc
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import folders, measure
from bench.cases import SUBJECTS, THREE, Chain, branches, chains
from bench.conftest import in_turn
from bench.modes import MODES, captured, modes, prepared, why_not
from bench.networks import Network, networks
from memcnn.memory import CUDA_BLOCK_BYTES, in_blocks
from memcnn.models.resnet import revnet38
from properties.devices import needs_cuda, reproducible_kernels

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def small(subject: str, depth: int, mode: str = "eager") -> Chain:
    return Chain("test", subject, depth, 2, 4, 6, mode)


def gradients(case, device: str = "cpu") -> list[torch.Tensor]:
    model, step = prepared(case, torch.device(device))
    step.run()
    return [parameter.grad for parameter in model.parameters()]


@pytest.fixture
def in_float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_subject_computes_the_gradients_of_plain(device, subject, in_float64):
    for ours, plain in zip(gradients(small(subject, 4), device), gradients(small("plain", 4), device), strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("mode", ["bf16", "channels_last"])
def test_a_mode_changes_how_a_step_runs_and_not_what_it_computes(device, mode):
    seen = set()
    case = small("reversible", 2, mode)
    model, step = prepared(case, torch.device(device))
    branches(model)[0].register_forward_hook(
        lambda _, x, y: seen.add((y.dtype, y.is_contiguous(memory_format=torch.channels_last)))
    )
    step.run()
    assert seen == {(torch.bfloat16, False) if mode == "bf16" else (torch.float32, True)}
    weight = next(model.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last) == (mode == "channels_last")
    limit = {"rtol": 0.2, "atol": 0.2} if mode == "bf16" else {"rtol": 1e-3, "atol": 1e-3}
    for ours, eager in zip(gradients(case, device), gradients(small("reversible", 2), device), strict=True):
        torch.testing.assert_close(ours / eager.abs().max(), eager / eager.abs().max(), **limit)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.* is deprecated:DeprecationWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)
def test_compiled_branches_are_compiled_once_for_all_blocks(monkeypatch):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, compile=torch.nn.Module.compile: compile(module, backend="aot_eager")
    )
    gradients(small("reversible", 6, "compile-branches"))
    assert counters["frames"]["ok"] == counters["frames"]["total"] == 1
    torch._dynamo.reset()


def test_a_graph_captures_a_warm_step_and_keeps_its_tensors_alive(monkeypatch):
    """The test records the calls that a GPU would receive, in order."""
    calls = []

    class Graph:
        def replay(self):
            calls.append("replay")

    stream = SimpleNamespace(wait_stream=lambda other: calls.append("wait"))
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "CUDAGraph": Graph,
        "stream": nullcontext,
        "graph": lambda graph, stream: nullcontext(),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def captured_step():
        model, step = prepared(small("reversible", 2), CPU)

        def run():
            calls.append(next(model.parameters()).grad is None)
            step.run()

        return weakref.ref(model), captured(model, dataclasses.replace(step, run=run)).run

    model, replay = captured_step()
    gc.collect()
    assert model() is not None
    replay()
    assert calls == ["wait", True, False, False, "wait", True, "replay"]


@needs_cuda
@pytest.mark.parametrize("subject", THREE)
def test_on_cuda_a_replayed_step_computes_what_the_eager_one_does(subject):
    with reproducible_kernels():
        model, step = prepared(small(subject, 2, "graph"), torch.device("cuda"))
        eager = gradients(small(subject, 2), "cuda")
    step.run()
    replayed = [parameter.grad.clone() for parameter in model.parameters()]
    step.run()
    for parameter, first, wanted in zip(model.parameters(), replayed, eager, strict=True):
        torch.testing.assert_close(parameter.grad, first)
        torch.testing.assert_close(first / wanted.abs().max(), wanted / wanted.abs().max(), rtol=1e-3, atol=1e-3)


def test_a_skipped_mode_says_that_it_needs_a_gpu_or_how_to_run_it():
    reasons = {case.mode: why_not(case, cuda=False, everywhere=False) for case in modes(quick=True, cuda=False)}
    assert set(reasons) == set(MODES) and "need a GPU" in reasons.pop("graph")
    assert all("--modes" in reason for reason in reasons.values())
    assert not any(why_not(case, cuda=True, everywhere=False) for case in modes(quick=False, cuda=True))
    assert not any(why_not(case, cuda=False, everywhere=False) for case in chains(quick=True, cuda=False))


@pytest.mark.parametrize(
    ("subject", "per_branch"),
    [
        ("plain", 1),
        ("checkpoint", 2),
        ("checkpoint-sqrt", 9 / 6),
        ("keep-every-2", 9 / 6),
        ("keep-every-4", 10 / 6),
        ("wrapped", 2),
        ("reversible", 2),
    ],
)
def test_evaluations_of_F_and_G_are_counted(device, subject, per_branch):
    counted = measure.evaluations(small(subject, 6), torch.device(device))
    assert counted == {"evaluations": 12 * per_branch, "branches": 12}


def test_evaluations_of_a_network_are_those_of_its_units(device):
    device = torch.device(device)
    on, off = (measure.evaluations(Network("revnet38", subject, 2), device) for subject in ("reversible", "plain"))
    assert off["evaluations"] == off["branches"] == on["branches"] == 2 * 7 + 2
    assert on["evaluations"] - off["evaluations"] == 2 * 7


def test_the_subjects_store_what_their_names_say(device):
    device = torch.device(device)
    block_bytes = CUDA_BLOCK_BYTES if device.type == "cuda" else 1
    x_bytes = in_blocks(2 * 4 * 6 * 6 * 4, block_bytes)

    def added_bytes(subject: str) -> int:
        """Return the activation bytes that twelve more blocks add."""
        peaks = [measure.memory(dataclasses.replace(small(subject, depth), series="gate"), device) for depth in (4, 16)]
        return peaks[1]["activation_bytes"] - peaks[0]["activation_bytes"]

    added = {subject: added_bytes(subject) for subject in SUBJECTS}
    assert added["checkpoint"] == 12 * x_bytes
    assert abs(added["reversible"]) < x_bytes and abs(added["wrapped"]) < x_bytes
    assert added["plain"] > added["keep-every-2"] > added["keep-every-4"] > added["checkpoint"]
    assert added["reversible"] < added["checkpoint-sqrt"] < added["plain"] / 2


def test_the_peak_of_a_network_is_split_to_the_byte(device):
    case, device = Network("revnet38", "reversible", 2), torch.device(device)
    split = measure.memory(case, device)
    block_bytes = CUDA_BLOCK_BYTES if device.type == "cuda" else 1
    with torch.device("meta"):
        parameter_bytes = sum(in_blocks(p.nbytes, block_bytes) for p in revnet38().parameters())
    assert block_bytes > 1 or parameter_bytes == 4 * 573_994
    assert split["parameter_bytes"] == split["optimizer_bytes"] == parameter_bytes
    parts = ("parameter", "buffer", "gradient", "optimizer", "batch", "activation")
    assert split["peak_bytes"] == sum(split[f"{part}_bytes"] for part in parts) <= split["allocated_bytes"]
    plain = measure.memory(dataclasses.replace(case, subject="plain"), device)
    assert split["activation_bytes"] < plain["activation_bytes"]


def test_subjects_take_turns_and_another_one_starts_each_round():
    turns = in_turn([*chains(quick=True, cuda=False), *networks(quick=True, cuda=False)], 3)
    tiny = [(case.subject, repeat) for case, repeat in turns if case.series == "tiny"]
    assert [repeat for _, repeat in tiny] == [0] * 7 + [1] * 7 + [2] * 7
    assert [tiny[7 * repeat][0] for repeat in range(3)] == list(SUBJECTS)[:3]
    assert len(turns) == len(set(turns)) == 3 * len({case for case, _ in turns})


def test_a_step_is_warm_and_long_enough_before_it_is_timed(monkeypatch):
    calls = []
    monkeypatch.setattr(measure, "clock", lambda: 0.03 * len(calls))
    step = dataclasses.replace(prepared(small("plain", 1), CPU)[1], run=lambda: calls.append(None))
    monkeypatch.setattr(measure, "prepared", lambda case, device: (None, step))
    _, rounds, steps = measure.warmed_up.__wrapped__(small("plain", 1), CPU)
    assert (rounds, steps) == (round(0.1 / 0.03), 1) and len(calls) * 0.03 >= measure.WARM_SECONDS


@pytest.mark.parametrize(
    ("seconds", "rounds", "steps"), [(0.002, 5, 10), (0.0031, 5, 7), (0.05, 2, 1), (0.5, 1, 1), (1e-5, 5, 2000)]
)
def test_on_a_gpu_a_round_queues_several_steps_and_a_repeat_is_as_long_as_on_a_cpu(seconds, rounds, steps):
    assert measure.repetitions(seconds, torch.device("cuda")) == (rounds, steps)
    assert measure.repetitions(seconds, CPU) == (min(50, max(1, round(0.1 / seconds))), 1)


def test_the_clock_waits_for_the_gpu_before_it_is_read(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(measure, "source", lambda: calls.append("read") or 0.0)
    measure.clock()
    assert calls == ["wait", "read"]


@pytest.fixture
def gpus(monkeypatch):
    """Simulate two GPUs, and return the numbers of those that became the current one."""
    current = []
    for name, fake in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "set_device": lambda device: current.append(device.index),
        "get_device_name": lambda device: ["NVIDIA H100 80GB HBM3", "NVIDIA H200"][device.index],
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    return current


def test_the_chosen_gpu_becomes_the_current_one_and_names_its_folder(gpus):
    found = [folders.folder_of(folders.choose_device(name)) for name in (None, "cuda", "cuda:1", "cpu")]
    assert [folder.name for folder in found] == ["nvidia-h100-80gb-hbm3"] * 2 + ["nvidia-h200", "cpu"]
    assert {folder.parent for folder in found} == {ROOT / "reports" / "bench"} and gpus == [0, 0, 1]
    with pytest.raises(ValueError, match="got 'cuda:2', but this PyTorch sees only cpu, cuda:0, cuda:1"):
        folders.choose_device("cuda:2")


def test_the_environment_of_a_gpu_names_its_libraries_clock_and_commit(gpus):
    found = folders.environment(torch.device("cuda", 1), "wall")
    assert found["device"].items() >= {"type": "cuda", "name": "NVIDIA H200", "clock": "wall"}.items()
    assert {"torch", "cuda", "cudnn", "python"} <= set(found["software"]) and {"commit", "clean"} <= set(found)
