"""The loop follows the recipe, writes record and curve, and ends with a status if a loss or weight is not finite."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from memcnn import data as cifar_data
from memcnn.memory import measure_step_memory
from memcnn.models.resnet import MODELS
from memcnn.training.loop import COLUMNS, Run
from memcnn.training.recipe import override
from memcnn.training.record import RunRecord, load
from properties.support.cifar_files import one_image
from properties.support.runs import DATA, NAME, RECIPE, checkpoint_of, curve_of, run, tiny, without

pytestmark = pytest.mark.usefixtures("tiny_runs")


def augmented_batch(iteration: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images of an iteration of seed 3, augmented one by one, in float64, and their labels."""
    plan = cifar_data.epoch_plan(3, iteration // 5, 40, pad=2, flip=True)
    positions = range(iteration % 5 * 8, iteration % 5 * 8 + 8)
    images = [
        one_image(
            DATA.train_images[plan.order[at]],
            DATA.mean,
            pad=2,
            top=int(plan.top[at]),
            left=int(plan.left[at]),
            flip=bool(plan.flip[at]),
        )
        for at in positions
    ]
    return torch.stack(images).double(), DATA.train_labels[plan.order[positions]]


@torch.no_grad()
def evaluated(model: nn.Module) -> dict[str, float]:
    """Return loss and accuracy on the 45 test images, computed in one pass."""
    logits, labels = model.eval()((DATA.test_images[:45] / 255 - DATA.mean).double()), DATA.test_labels[:45]
    model.train()
    accuracy = 100 * (logits.argmax(1) == labels).double().mean().item()
    return {"test_loss": F.cross_entropy(logits, labels).item(), "test_accuracy": accuracy}


def test_training_follows_the_recipe(tmp_path):
    """Compare with SGD written by hand, images augmented one by one, and evaluations of all test images at once."""
    record = run(tmp_path, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = tiny().double()
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    rows, losses = [], []
    for iteration in range(12):
        images, labels = augmented_batch(iteration)
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        rate = 0.1 if iteration < 7 else 0.01 if iteration < 11 else 0.001
        with torch.no_grad():
            for parameter, gradient, speed in zip(model.parameters(), gradients, velocity, strict=True):
                speed.mul_(0.9).add_(gradient + 2e-4 * parameter)
                parameter.sub_(rate * speed)
        if iteration + 1 in (5, 10, 12):
            row = {"iteration": iteration + 1, "epoch": (iteration + 1) / 5, "learning_rate": rate}
            rows.append(row | {"train_loss": sum(losses) / len(losses)} | evaluated(model))
            losses = []

    folder = tmp_path / NAME.replace("s0", "s3")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(checkpoint_of(folder)["model"][name].to(value.dtype), value, rtol=1e-4, atol=1e-5)
    curve = curve_of(folder)
    assert list(curve[0]) == list(COLUMNS)
    for row, expected in zip(curve, rows, strict=True):
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-5)
    last = rows[-1]
    reached = (record.test_iteration, record.test_accuracy, record.test_loss)
    assert reached == pytest.approx((12, last["test_accuracy"], last["test_loss"]), rel=1e-5)
    assert record.train_seconds == float(curve[-1]["train_seconds"])


def test_the_seed_determines_the_initial_weights_and_the_callers_generator_is_unchanged(tmp_path):
    for seed in (0, 7):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = tiny().state_dict()
        state = torch.get_rng_state()
        run(tmp_path, seed=seed, budget_seconds=0)
        assert torch.equal(torch.get_rng_state(), state)
        weights = checkpoint_of(tmp_path / NAME.replace("s0", f"s{seed}"))["model"]
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_the_record_holds_model_data_and_memory(tmp_path):
    record = run(tmp_path)
    model = tiny().to(memory_format=torch.channels_last)
    images = torch.zeros(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(8, dtype=torch.int64)
    memory = measure_step_memory(model, lambda: F.cross_entropy(model(images), labels).backward())
    assert vars(memory).items() <= vars(record).items()
    assert record.parameters == 3 * 4 * 16 + 4 + 8 + 256 * 10 + 10
    assert (record.model, record.dataset, record.seed, record.recipe) == ("resnet32", "cifar10", 0, RECIPE)
    assert record.data == {"official": False, "checksums": DATA.checksums}
    assert record.device["threads"] == torch.get_num_threads()
    assert (record.status, record.reason, record.interruptions, record.engine) == ("complete", None, 0, True)
    assert load(tmp_path / NAME) == record


def test_record_curve_and_checkpoint_are_written_at_every_evaluation(tmp_path, monkeypatch):
    written, write = [], RunRecord.write

    def spy(self, folder):
        assert [int(row["iteration"]) for row in curve_of(folder)] == [5, 10, 12][: len(written) + 1]
        assert checkpoint_of(folder)["iteration"] == self.iterations
        written.append((self.status, self.reason, self.iterations, self.test_iteration))
        return write(self, folder)

    monkeypatch.setattr(RunRecord, "write", spy)
    run(tmp_path)
    assert written == [("partial", None, 5, 5), ("partial", None, 10, 10), ("complete", None, 12, 12)]


class Counting(nn.Module):
    """The tiny network, which can fail in a given training step. Its state contains the number of steps."""

    def __init__(self, *, loss_fails_at: int = 0, buffer_fails_at: int = 0) -> None:
        super().__init__()
        self.inner, self.loss_fails_at, self.buffer_fails_at = tiny(), loss_fails_at, buffer_fails_at
        self.register_buffer("steps", torch.tensor(0.0))

    def forward(self, images):
        if self.training:
            self.steps += 1
            if self.steps == self.buffer_fails_at:
                self.steps += math.inf
        failing = self.training and self.steps == self.loss_fails_at
        return self.inner(images) * (math.nan if failing else 1)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "at the next evaluation"])
def test_a_loss_that_is_no_number_ends_the_run_with_its_iteration(tmp_path, monkeypatch, late):
    if late:  # as on a GPU, whose losses are not read in every step
        step = Run.step

        def blind_step(self):
            checked, Run.check_losses = Run.check_losses, lambda self: None
            try:
                return step(self)
            finally:
                Run.check_losses = checked

        monkeypatch.setattr(Run, "step", blind_step)
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Counting(loss_fails_at=8))
    record = run(tmp_path)
    assert (record.status, record.reason) == ("failed", "loss is nan at iteration 8")
    assert (record.iterations, record.test_iteration) == (7, 5)
    assert load(tmp_path / NAME) == record
    good = checkpoint_of(tmp_path / NAME)
    assert good["iteration"] == 5
    assert all(value.isfinite().all() for value in good["model"].values())

    again = run(tmp_path)
    assert (again.status, again.reason, again.interruptions) == ("failed", record.reason, 1)
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Counting())
    assert run(tmp_path).status == "complete"


def test_a_spoilt_weight_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "resnet32", lambda num_classes, *, disable: Counting(buffer_fails_at=3))
    record = run(tmp_path, recipe=override(RECIPE, evaluate_every=2))
    assert (record.status, record.reason) == ("failed", "steps is not finite after iteration 4")
    folder = tmp_path / NAME.replace(RECIPE.name, record.recipe.name)
    assert checkpoint_of(folder)["iteration"] == 2


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch, capsys):
    record = run(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / NAME).iterdir() if path.is_file()}
    monkeypatch.setitem(MODELS, "resnet32", None)
    monkeypatch.setattr(cifar_data, "load", None)
    assert run(tmp_path, progress=True) == record
    assert "already complete" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / NAME).iterdir() if path.is_file()} == before


def test_fresh_moves_the_old_run_aside(tmp_path):
    contents = []
    for _ in range(3):
        run(tmp_path, fresh=True)
        contents.append((tmp_path / NAME / "checkpoint.pt").read_bytes())
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, f"{NAME}.old-1", f"{NAME}.old-2"]
    for number, content in enumerate(contents[:2], start=1):
        assert (tmp_path / f"{NAME}.old-{number}" / "checkpoint.pt").read_bytes() == content
    with open(tmp_path / NAME / "curve.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 3


def test_the_same_seed_gives_the_same_run_and_other_seeds_give_others(tmp_path):
    results = [
        (without(vars(run(tmp_path / str(number), seed=seed)), "train_seconds", "commit", "clean", "segments"), seed)
        for number, seed in enumerate((0, 0, 1))
    ]
    assert results[0] == results[1]
    assert results[0][0]["test_loss"] != results[2][0]["test_loss"]


def test_progress_goes_to_standard_error_in_lines_or_not_at_all(tmp_path, capsys):
    run(tmp_path, budget_seconds=0)
    run(tmp_path)
    assert capsys.readouterr() == ("", "")
    run(tmp_path, fresh=True, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert len(lines) == 3 and all(NAME in line and "images/s" in line and "left" in line for line in lines)
    assert "12/12: loss " in lines[2] and f"test {load(tmp_path / NAME).test_accuracy:.2f}%" in lines[2]


def test_a_terminal_gets_a_bar_with_rate_loss_accuracy_and_time_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("memcnn.training.progress.BAR_SECONDS", 0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    run(tmp_path, progress=True)
    bar = capsys.readouterr().err
    assert "100%" in bar and "images/s" in bar and "loss=" in bar and "train=" in bar and "test=" in bar and "<" in bar
