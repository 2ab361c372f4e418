"""Tests of ``bench.memory``: predictions, the search for the largest batch and depth, and the page of activations."""

import json
import re
import weakref
from functools import partial

import pandas as pd
import pytest
import torch
from torch import nn

from bench import measured_memory
from bench.memory import options, published
from bench.memory import subject as memory
from bench.memory.__main__ import main
from memcnn.models.resnet import MODELS
from reports import tables

MIB = 2**20
OWN = f"{__name__}:own_model"


def own_model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))


def subject(**options) -> memory.Subject:
    return memory.Subject("own", own_model, (4, 2, 8, 8), None, **options)


def test_the_largest_batch_fits_and_one_more_does_not():
    found = memory.largest_batch(subject(), MIB)
    batches = found["largest"], found["largest"] + 1
    assert subject().of_batch(7).make_batch()[0].shape == (7, 2, 8, 8)
    at, above = (memory.predict(subject().of_batch(batch), "cuda").peak_bytes for batch in batches)
    assert (found["peak_bytes"], found["next_peak_bytes"]) == (at, above) and at <= MIB < above


def test_the_largest_depth_fits_and_one_more_does_not():
    small = memory.Subject("revnet38", MODELS["revnet38"], (2, 3, 32, 32), 10)
    budget = memory.predict(small, "cuda").peak_bytes - 1  # three units a stage do not fit
    found = memory.largest_depth(small, budget, disable=False, limit=64)
    assert found["largest"] == 2 and found["peak_bytes"] <= budget < found["next_peak_bytes"]


@pytest.mark.parametrize("name", MODELS)
def test_depths_are_those_of_the_named_networks(name):
    with torch.device("meta"):
        named = MODELS[name](7)
        units = len(named.stages[0])
        again = memory.DEPTHS[name](units=3 * [units], num_classes=7)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (named, again)]
    assert shapes[0] == shapes[1]
    assert memory.layers(name) * units + 2 == int(re.search(r"\d+", name)[0])


def test_the_rules_of_2018_give_the_published_activations():
    values = tables.published().dropna(subset="activations_mib").set_index("model").loc["resnet32"]
    held = published.held_after_forward(MODELS["resnet32"], 100)
    assert held["blocks of 2018"] / MIB == pytest.approx(values.activations_mib, abs=0.05)
    assert held["tensors"] / MIB < values.activations_mib - 1
    assert published.model_blocks(MODELS["resnet32"]) / MIB == pytest.approx(values.parameters_mib, abs=0.05)


def test_the_stems_relu_saves_one_map_if_the_first_unit_is_reversible():
    def without(name: str) -> int:
        whole = published.held_after_forward(MODELS[name], 4)["tensors"]
        return whole - published.held_after_forward(
            lambda: published.without_stem_relu(MODELS[name]()), 4)["tensors"]  # fmt: skip

    assert without("revnet38") == 4 * 32 * 32 * 32 * 4
    assert without("resnet32") == 0


def test_the_peak_equals_that_of_recorded_runs():
    """Runs on a CPU have recorded these bytes for a float32 step at batch 100.

    Old records of RevNets, made when recomputations still updated running statistics, have 912 bytes more.
    """
    assert published.peak_activations(MODELS["resnet32"], 100) == 250_685_064
    assert published.peak_activations(MODELS["revnet38"], 100) == 108_139_144


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("80 GB", 80e9), ("1.5mib", 1.5 * MIB), ("7", 7)])
def test_a_size_is_read(text, size):
    assert options.size(text) == size


def test_the_command_predicts_and_measures_its_error(tmp_path, capsys):
    path = tmp_path / "memory.json"
    command = f"{OWN} --shape 4,2,8,8 --device-memory 3MiB --reserve 2MiB --optimizer adam --json {path}"
    assert main(command.split()) == 0
    result, out = json.loads(path.read_text()), capsys.readouterr().out
    (row,) = [row for row in result["check"] if row["device"] == "cpu"]
    assert row["predicted_bytes"] == row["tensor_bytes"] <= row["allocated_bytes"]
    assert result["peak"] == json.loads(json.dumps(vars(memory.predict(subject(optimizer="adam"), "cuda"))))
    assert result["largest_batch"] == memory.largest_batch(subject(optimizer="adam"), MIB)
    assert "error +0.000%" in out and f"largest batch: {result['largest_batch']['largest']:,}, " in out
    if not torch.cuda.is_available():
        assert "on CUDA: not measured, there is no CUDA device" in out


def test_measured_bytes_equal_predicted_bytes(tmp_path, capsys):
    arguments = ["--networks", "revnet38", "--batch", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert measured_memory.main(arguments) == 0
    table = pd.read_csv(tmp_path / "memory.csv").set_index(["precision", "engine"])
    for engine in (True, False):
        make = partial(MODELS["revnet38"], disable=not engine)
        row = table.loc["float32", engine]
        assert row.activation_bytes == pytest.approx(published.peak_activations(make, 2), rel=0.02)
        assert row.held_bytes == pytest.approx(published.held_after_forward(make, 2)["tensors"], rel=0.02)
        assert row.peak_bytes > row.activation_bytes + 2 * row.parameter_bytes == row.activation_bytes + 8 * 573_994
    assert set(table.device_type) == {"cpu"} and set(table.meter) == {"tensors"} and table.commit.notna().all()


def test_on_a_gpu_held_bytes_are_the_increase_of_the_allocators_count(monkeypatch):
    held = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000 + sum(len(h()) for h in held if h()))

    class Bytes(bytearray):
        pass

    def make_batch():
        made = Bytes(100), Bytes(20)
        held.extend(map(weakref.ref, made))
        return made

    def loss_of(images, labels):
        loss = Bytes(len(images) + 7)
        held.append(weakref.ref(loss))
        return loss

    assert measured_memory.held_after_forward(make_batch, loss_of, torch.device("cuda")) == 100 + 20 + 107
    assert torch.cuda.memory_allocated(None) == 1000, "all of it was freed"


def test_the_page_of_activations_has_a_dash_for_missing_gpu_measurements(tmp_path):
    values = tables.published().dropna(subset="activations_mib").set_index("model")
    none = published.on_gpu(values, tmp_path / "none", tmp_path / "none")
    assert none.count("—") == 6 * 5
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "memory.csv").write_text(
        "model,precision,activation_bytes,held_bytes,device,device_type,batch,engine\n"
        f"resnet32,float32,{240 * MIB},{238 * MIB},NVIDIA H100,cuda,100,True\n"
        f"revnet38,float32,{300 * MIB},{290 * MIB},NVIDIA H100,cuda,100,False\n"
    )
    lines = published.on_gpu(values, tmp_path, tmp_path / "none").splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "resnet32", "238.6", "238.0", "240.0", "—", "—", "NVIDIA H100"]  # fmt: skip
    assert "\n".join(lines).count("—") == 5 * 5 + 2
