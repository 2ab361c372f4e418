"""Options choose an execution. Options without effect are reported, impossible ones refused, and settings restored."""

import argparse

import pytest
import torch

from memcnn.kernels import BatchNormReLU2d, NarrowConv2d
from memcnn.training.execution import Execution
from memcnn.training.options import add_execution_options, execution_of, explicit_execution
from memcnn.training.step import TrainingStep
from properties.support.executions import CPU, SMALL, small_resnet, small_revnet
from properties.support.runs import DATA, run

pytestmark = pytest.mark.usefixtures("tiny_runs")


def parsed(words: str):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device")
    add_execution_options(parser)
    return parser.parse_args(words.split())


def test_fast_is_the_fastest_execution_of_the_device(monkeypatch):
    on_gpu = Execution(precision="bf16", graph=True, compile=True, narrow_convolutions=True)
    monkeypatch.setattr("memcnn.training.execution.has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert execution_of(parsed("--fast")) == Execution.fastest(CPU)
    assert execution_of(parsed("--fast --device cuda:1")) == on_gpu
    assert execution_of(parsed("--fast --device cuda"), "cpu") == Execution.fastest(CPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert execution_of(parsed("--fast")) == on_gpu
    assert execution_of(parsed("--fast --deterministic --sync-batch-norm"), processes=2) == Execution(
        precision="bf16", compile=True, deterministic=True, sync_batch_norm=True
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert execution_of(parsed("--fast")) == Execution.fastest(torch.device("cuda"), processes=2)
    assert not execution_of(parsed("--fast")).graph
    assert execution_of(parsed("--no-fast")) == execution_of(parsed("")) == Execution()


def test_without_triton_fast_leaves_out_the_options_that_need_it(monkeypatch):
    monkeypatch.setattr("memcnn.training.execution.has_triton", lambda: False)
    assert execution_of(parsed("--fast --device cuda")) == Execution(precision="bf16", graph=True)
    effective, without_effect = Execution(narrow_convolutions=True).on(torch.device("cuda"))
    assert effective == Execution() and without_effect == [
        "narrow-convolutions has no effect without Triton: pip install triton"
    ]


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
@pytest.mark.parametrize("processes", [1, 2])
def test_the_fastest_execution_is_possible(device, processes):
    fastest = Execution.fastest(device, processes=processes)
    assert fastest.on(device, processes=processes) == (fastest, [])


def test_fast_is_refused_with_an_option_that_it_chooses_itself():
    for words, named in (
        ("--graph", "--graph"),
        ("--precision float32", "--precision"),
        ("--compile --graph", "--graph and --compile"),
    ):
        with pytest.raises(ValueError, match=f"got --fast and {named}: --fast chooses precision"):
            execution_of(parsed(f"--fast {words}"))
    assert explicit_execution(parsed("--deterministic")) == []


def test_options_without_effect_on_a_cpu_are_reported_and_left_out(tmp_path, capsys):
    nothing = Execution(
        precision="tf32", graph=True, sync_batch_norm=True, deterministic=True, narrow_convolutions=True
    )
    record = run(tmp_path, execution=nothing, progress=True)
    assert record.software["execution"] == "float32"
    said = capsys.readouterr().err
    for name in ("graph", "tf32", "deterministic", "sync-batch-norm", "narrow-convolutions"):
        assert f"{name} has no effect" in said


@pytest.mark.parametrize(("option", "layer"), [("narrow_convolutions", NarrowConv2d), ("fused_norms", BatchNormReLU2d)])
def test_our_layers_replace_plain_ones_only_on_request(option, layer):
    plain, replaced = (small_revnet() for _ in range(2))
    TrainingStep(plain, SMALL, DATA, Execution())
    TrainingStep(replaced, SMALL, DATA, Execution(**{option: True}))
    assert not any(isinstance(module, layer) for module in plain.modules())
    assert any(isinstance(module, layer) for module in replaced.modules())


@pytest.mark.parametrize("make", [small_resnet, small_revnet])
@pytest.mark.parametrize("combine", [False, True])
def test_the_compiler_combines_kernels_only_on_request(make, combine, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(options["options"]) or function)
    TrainingStep(make(), SMALL, DATA, Execution(compile=True, combine_kernels=combine))
    assert given == [{"combo_kernels": True} if combine else None] * len(given) != []


def test_impossible_executions_are_refused():
    with pytest.raises(ValueError, match="got deterministic and narrow-convolutions"):
        Execution(deterministic=True, narrow_convolutions=True).on(torch.device("cuda"))
    with pytest.raises(ValueError, match="precision: got 'fp8', wanted one of float32, tf32, bf16"):
        Execution(precision="fp8")
    with pytest.raises(ValueError, match="sync-batch-norm: PyTorch synchronises BatchNorm on GPUs only"):
        Execution(sync_batch_norm=True).on(CPU, processes=2)
    with pytest.raises(ValueError, match="graph: a step is captured for one process only"):
        Execution(graph=True).on(torch.device("cuda"), processes=2)


def test_settings_of_an_execution_end_with_it():
    """TensorFloat-32 is PyTorch's default for convolutions on a GPU: float32 must switch it off."""

    def found() -> tuple:
        cudnn = torch.backends.cudnn
        return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark

    before = found()
    with Execution(precision="tf32").settings(torch.device("cuda")):
        assert found() == ("high", True, False, True)
    assert found() == before
    with Execution(deterministic=True).settings(torch.device("cuda")):
        assert found() == ("highest", False, True, False)
    assert found() == before
    with pytest.raises(ZeroDivisionError), Execution().settings(torch.device("cuda")):
        assert found() == ("highest", False, False, True)
        raise ZeroDivisionError
    assert found() == before
