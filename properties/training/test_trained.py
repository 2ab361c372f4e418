"""The files of a run: its checkpoint can be evaluated and its weights loaded; names of other folders are refused."""

import json
from dataclasses import replace

import pytest
import torch

import memcnn
from memcnn import data as cifar_data
from memcnn import evaluate as command
from memcnn.training import checkpoint, record
from memcnn.training.recipe import override
from properties.support.runs import DATA, NAME, RECIPE, checkpoint_of, run

pytestmark = pytest.mark.usefixtures("tiny_runs")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_runs):
    """Return a folder with the complete tiny run."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder)
    return folder


def test_an_evaluation_equals_the_last_one_of_the_run(runs, capsys):
    found = record.load(runs / NAME)
    model, _, iterations = memcnn.weights.load_run(runs / NAME)
    assert iterations == 12
    assert command.evaluate(model, DATA, images=45) == (found.test_loss, found.test_accuracy)
    assert command.main([str(runs / NAME)]) == 0
    said = capsys.readouterr().out
    result = f"{found.test_accuracy:.2f} %, loss {found.test_loss:.4f}"
    assert f"after iteration 12 of 12:\n  test accuracy {result}, on 45 images\n" in said
    assert said.endswith(f"in its record {result}, after iteration 12 (generated data)\n")


def test_an_evaluation_on_other_images_says_so(runs, capsys, monkeypatch):
    monkeypatch.setattr(cifar_data, "load", lambda *a, **b: replace(DATA, checksums={"test_batch": "another"}))
    assert command.main([str(runs / NAME), "--data", "elsewhere"]) == 0
    assert "on 45 images, other data than in its training" in capsys.readouterr().out


def test_trained_weights_are_loaded_by_name(runs):
    model = memcnn.load_trained(NAME, runs=runs)
    assert not model.training
    torch.testing.assert_close(dict(model.state_dict()), dict(checkpoint_of(runs / NAME)["model"]), rtol=0, atol=0)
    images = cifar_data.normalise(DATA.test_images[:45], DATA.mean)
    right = (model(images).argmax(1) == DATA.test_labels[:45]).double().mean().item()
    assert 100 * right == pytest.approx(record.load(runs / NAME).test_accuracy)


@pytest.mark.parametrize("name", ["../runs", "a/b", "..", ".", "", "/etc", f"x/../{NAME}", f"{NAME}/", f"./{NAME}"])
def test_a_name_that_is_not_one_folders_is_refused(runs, name):
    with pytest.raises(ValueError, match="name of a run: got .*, wanted a folder's name"):
        memcnn.load_trained(name, runs=runs)


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "a\\b", "a\0b", "", "a b", "ü", "a\nb"])
def test_a_recipe_name_with_unsafe_characters_is_refused(name):
    with pytest.raises(ValueError, match="recipe name: got "):
        replace(RECIPE, name=name)


def test_the_name_of_a_run_is_one_folder_for_every_name_of_a_recipe(tmp_path):
    for name in ("..", ".", "...", "-", "+"):
        path = tmp_path / record.run_name("resnet32", "cifar10", replace(RECIPE, name=name), 0)
        assert path.resolve().parent == tmp_path.resolve()


def test_a_run_that_is_not_complete_is_loaded_only_when_asked_for(runs, tmp_path):
    run(tmp_path, recipe=override(RECIPE, iterations=13), budget_seconds=0)
    (folder,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="is partial, 0 of 13 iterations: pass partial=True"):
        memcnn.load_trained(folder.name, runs=tmp_path)
    assert memcnn.load_trained(folder.name, runs=tmp_path, partial=True)


def test_weights_of_another_run_are_refused(runs, tmp_path, capsys):
    run(tmp_path, seed=1)
    (folder,) = tmp_path.iterdir()
    (folder / "checkpoint.pt").write_bytes((runs / NAME / "checkpoint.pt").read_bytes())
    with pytest.raises(checkpoint.BadCheckpoint, match="belongs to another run: seed is 0 there, 1 here"):
        memcnn.load_trained(folder.name, runs=tmp_path)
    with pytest.raises(SystemExit) as raised:
        command.main([str(folder)])
    assert raised.value.code == 2 and "seed is 0 there" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_not_replaced_by_an_older_one(tmp_path):
    run(tmp_path)
    path = tmp_path / NAME / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(checkpoint.BadCheckpoint, match="its seal is broken"):
        memcnn.load_trained(NAME, runs=tmp_path)


def test_a_hostile_record_names_no_other_folder_or_model(runs, tmp_path):
    values = json.loads((runs / NAME / "record.json").read_text())
    for change in ({"model": "../../x"}, {"dataset": "os"}, {"recipe": {**values["recipe"], "name": "../x"}}):
        (tmp_path / "record.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(record.BadRecord):
            memcnn.weights.load_run(tmp_path)


def test_misuse_and_missing_data_have_the_statuses_of_training(runs, tmp_path, monkeypatch, capsys):
    for words in ([str(tmp_path)], [str(runs / NAME), "--device", "tpu"], []):
        assert _status(words) == 2
    monkeypatch.setattr(memcnn.data.files.torchvision.datasets.utils, "download_and_extract_archive", _no_network)
    assert command.main([str(runs / NAME), "--data", str(tmp_path)]) == 1
    assert "CIFAR10 was looked for in" in capsys.readouterr().err


def _status(words: list[str]) -> int:
    """Return the exit status of the command, which it raises as SystemExit for misuse that its parser finds."""
    try:
        return command.main(words)
    except SystemExit as stop:
        return stop.code


def _no_network(*arguments, **options):
    raise OSError("no network")
