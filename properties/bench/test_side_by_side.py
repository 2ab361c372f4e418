"""The page of all devices has a group of columns for each, and a dash for each missing measurement."""

import json
import shutil

import pandas as pd
import pytest

from bench import folders, side_by_side
from bench.speed import text as speed_text
from reports import page

CPU = folders.MEASUREMENTS / "cpu"
MEMORY = (
    "model,precision,activation_bytes,held_bytes,device,device_type,batch,engine\n"
    f"revnet38,bf16,{60 * 2**20},{50 * 2**20},NVIDIA H200,cuda,100,True\n"
    f"resnet32,bf16,{121 * 2**20},{110 * 2**20},NVIDIA H200,cuda,100,True\n"
)


@pytest.fixture
def root(tmp_path):
    """Return a folder with the committed measurements of a CPU, and invented speed and memory of a GPU."""
    shutil.copytree(CPU, tmp_path / "cpu", ignore=shutil.ignore_patterns("figures"))
    gpu = {"device_type": "cuda", "device": "NVIDIA H200", "cuda": "13.0", "cudnn": "9"}
    rows = speed_text.read(CPU).iloc[:1].assign(execution="bf16, graph", **gpu)
    speed_text.add(tmp_path / "nvidia-h200", pd.concat([rows.assign(ms=3.0), rows.assign(ms=1.5, group=4)]))
    (tmp_path / "nvidia-h200" / "memory.csv").write_text(MEMORY)
    (tmp_path / "empty").mkdir()
    return tmp_path


def tables(root) -> dict[str, pd.DataFrame]:
    devices = [side_by_side.load(root / name) for name in ("cpu", "nvidia-h200")]
    return {title: table.set_index("") for title, _, table in side_by_side.sections(devices)}


def test_each_device_has_columns_of_what_was_measured_on_it_and_dashes_for_the_rest(root):
    found = tables(root)
    speed = found["A training step as training executes it"]
    cpu = speed_text.read(CPU).iloc[0]
    name = side_by_side.load(root / "cpu").name
    assert list(speed.columns) == [f"{name}: ms", f"{name}: times the floor", "NVIDIA H200: ms",
                                   "NVIDIA H200: times the floor"]  # fmt: skip
    assert list(speed.loc["resnet32, float32"])[:3] == [f"{cpu.ms:,.0f}", f"{cpu.ms / cpu.floor_ms:.1f}", "—"]
    assert list(speed.loc["resnet32, bf16, graph of 4"])[:3] == ["—", "—", "1.50"]
    memory = found["Memory of a training step, MiB"]
    assert list(memory.loc["revnet38, engine on, bf16"]) == ["60.0", "50.0"]
    assert all(column.startswith("NVIDIA H200") for column in memory)
    chains = found["Chains of 16 blocks"]
    assert chains.loc["plain autograd", f"{name}: activations"] == "100.0 %"


def test_the_command_writes_both_pages_and_leaves_out_a_folder_that_it_cannot_read_by_name(root, capsys):
    (root / "bad").mkdir()
    (root / "bad" / "environment.json").write_text(json.dumps([]))
    assert side_by_side.main(["--folder", str(root)]) == 1
    assert "bad is left out: " in capsys.readouterr().err
    for name in ("README.md", "page.html"):
        text = (root / name).read_text()
        assert "NVIDIA H200: times the floor" in text and "60.0" in text and "nan" not in text


def test_the_committed_page_is_that_of_the_committed_measurements():
    devices = [side_by_side.load(path) for path in sorted(folders.MEASUREMENTS.glob("*")) if path.is_dir()]
    text = (folders.MEASUREMENTS / "README.md").read_text("utf-8")
    made = side_by_side.page_of([device for device in devices if device])
    assert page.markdown(made) == text, side_by_side.COMMAND
