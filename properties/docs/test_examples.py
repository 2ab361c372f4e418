"""The programs in examples/ are short and do what they say."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    (path,) = (path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHORT_TRAININGS = {
    "train_cifar irevnet": ["--data", "generated", "--steps", "2", "--batch", "4"],
    "train_cifar vit": ["--data", "generated", "--steps", "2", "--batch", "4"],
    "train_cifar momentum": ["--data", "generated", "--steps", "2", "--batch", "4"],
    "train_glow": ["--data", "generated", "--steps", "2", "--batch", "2", "--depth", "1"],
    "train_lm": ["--steps", "2", "--batch", "2", "--depth", "1"],
    "train_ode": ["--training-steps", "2"],
    "train_unet": ["--steps", "2", "--size", "8"],
}
"""Training examples and the options that make them short."""


def test_every_example_is_tried_here():
    trained = {name.split()[0] for name in SHORT_TRAININGS}
    assert {path.stem for path in EXAMPLES} - trained == {"custom_block", "deep_network", "flow_2d", "memcnn_1_5"}


@pytest.mark.parametrize("name", SHORT_TRAININGS)
def test_a_training_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [*name.split(), *SHORT_TRAININGS[name]])
    load(name.split()[0]).main()
    assert re.search(r"\d\.\d", capsys.readouterr().out), "it prints a loss"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_under_a_hundred_lines(path):
    assert len(path.read_text("utf-8").splitlines()) < 100


def test_the_example_of_memcnn_1_5_inverts(capsys):
    load("memcnn_1_5").main()
    assert "largest difference" in capsys.readouterr().out


def test_the_custom_block_holds_every_law_and_the_faulty_one_is_found(capsys):
    load("custom_block").main()
    printed = capsys.readouterr().out
    assert "Leapfrog: all laws hold: inverse, gradients, state, memory" in printed
    assert "Faulty: inverse gives something else than x" in printed


def test_two_hundred_blocks_need_the_bytes_of_two(capsys):
    load("deep_network").main()
    rows = [line.replace(",", "").split() for line in capsys.readouterr().out.splitlines()]
    bytes_of = {int(row[0]): (int(row[1]), int(row[2])) for row in rows if len(row) == 3 and row[0].isdigit()}
    assert bytes_of[200][1] == bytes_of[2][1]
    assert bytes_of[200][0] > 40 * bytes_of[2][0]


def test_the_flow_learns_a_density_and_draws_it(capsys, monkeypatch, tmp_path):
    flow = load("flow_2d")
    monkeypatch.setattr(flow, "STEPS", 50)
    monkeypatch.setattr(flow.sys, "argv", ["flow_2d.py", str(tmp_path / "flow.png")])
    flow.main()
    words = capsys.readouterr().out.split()
    assert float(words[words.index("test:") + 1]) < 1.9, "a normal distribution has about 2.2 nats a point"
    assert float(words[words.index("picture:") + 1]) == pytest.approx(1.0, abs=0.02)
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")


def test_the_log_density_is_that_of_the_jacobian():
    flow = load("flow_2d")
    torch.manual_seed(0)
    model = flow.flow().double()
    points = flow.two_moons(5).double()
    model.train()(points)  # initialises ActNorm
    got = flow.log_density(model.eval(), points)
    for point, value in zip(points, got, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: model(x[None])[0], point)
        y = model(point[None])[0]
        normal = torch.distributions.Normal(torch.zeros(2).double(), 1.0).log_prob(y).sum()
        torch.testing.assert_close(value, normal + torch.linalg.slogdet(jacobian).logabsdet)
