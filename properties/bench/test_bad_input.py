"""Bad input ends every command with exit status 2 and a short message, without traceback or usage; no file changes."""

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from memcnn import cli

TRAIN = ["resnet32", "cifar10"]
SMOKE = [*TRAIN, "--recipe", "smoke", "--data", "generated", "--runs", "{folder}"]
BLOCK = "{blocks}"
RESNET = "memcnn.models.resnet:resnet32"
LONG = "n" * 300

COMMANDS = {
    "memcnn.train": [
        ([], "missing MODEL"),
        (["resnet32"], "missing DATASET after resnet32, one of cifar10, cifar100"),
        (["cifar10"], "argument MODEL: got the data set 'cifar10'"),
        (["resnet33", "cifar10"], "argument MODEL: got 'resnet33', wanted one of resnet32"),
        (["resnet32", "mnist"], "DATASET"),
        ([*TRAIN, "extra"], "got 'extra'"),
        ([*TRAIN, "--sed", "1"], "did you mean --seed?"),
        ([*TRAIN, "--seed", "x"], "argument --seed: got 'x', wanted a whole number"),
        ([*SMOKE, "--seed", "-1"], "seed: got -1"),
        ([*SMOKE, "--seed", "9" * 25], "seed: got 999"),
        ([*TRAIN, "--milestones", "5,abc"], "argument --milestones: got '5,abc', wanted iterations"),
        ([*TRAIN, "--milestones", "9,5"], "milestones: got (9, 5), wanted ascending"),
        ([*TRAIN, "--iterations", "0"], "iterations: got 0"),
        ([*TRAIN, "--iterations", "1e3"], "argument --iterations: got '1e3', wanted a whole number"),
        ([*TRAIN, "--batch-size", "-5"], "batch_size: got -5"),
        ([*TRAIN, "--learning-rate", "nan"], "argument --learning-rate: got 'nan', wanted a number"),
        ([*TRAIN, "--momentum", "1"], "momentum: got 1.0"),
        ([*TRAIN, "--test-images", "0"], "argument --test-images: got '0'"),
        ([*TRAIN, "--test-images", "none"], "argument --test-images: got 'none'"),
        ([*TRAIN, "--threads", "0"], "argument --threads: got '0'"),
        ([*TRAIN, "--threads", "9" * 30], "argument --threads: got '999"),
        ([*TRAIN, "--budget", "soon"], "argument --budget: got 'soon', wanted a time"),
        ([*SMOKE, "--device", "tpu"], "device: got 'tpu'"),
        (["--list", "--runs", "{missing}"], "which does not exist; wanted a folder of runs"),
        (["--list", "--runs", ""], "got '', wanted a path"),
        (["--list", "--runs", "{file}"], "which is a file; wanted a folder"),
        ([*TRAIN, "--runs", "{file}"], "which is a file; wanted a folder"),
        ([*SMOKE, "--precision", "int8"], "argument --precision"),
        ([*SMOKE, "--fast", "--precision", "bf16"], "got --fast and --precision"),
        ([*SMOKE, "--runs", "{file}"], "argument --runs"),
        ([*SMOKE, "--runs", "{file}/below"], "argument --runs: {file} is a file; wanted a folder: choose another path"),
        ([*SMOKE, "--runs", LONG], "File name too long; choose a shorter name"),
    ],
    "memcnn.evaluate": [
        ([], "RUN_FOLDER"),
        (["{missing}"], "there is no such folder; wanted the folder of a run"),
        (["{folder}"], "holds no record.json, so it is no run"),
        (["{file}"], "is a file; wanted the folder of a run"),
        (["{junk_run}"], "record.json"),
        (["{folder}", "--threads", "many"], "argument --threads: got 'many'"),
        (["{folder}", "--device", "tpu"], "argument --device"),
        (["{folder}", "--dat", "x"], "did you mean --data?"),
        ([LONG], "File name too long; choose a shorter name"),
    ],
    "memcnn.convert": [
        ([], "IN, OUT"),
        (["{missing}", "{new}"], "No such file"),
        (["{file}", "{new}"], "holds more than tensors"),
        (["{folder}", "{new}"], "wanted a file that torch.save wrote"),
        (["{file}", "{file}"], "exists already; wanted a new file"),
        (["{file}", "{file}/x.pt"], "is not a folder"),
        (["{file}", "{new}", "--model", "alexnet"], "argument --model"),
        (["{file}", LONG], "File name too long; choose a shorter name"),
    ],
    "memcnn.verify": [
        (["{blocks}:make", "--shape", "2,4,4,4", "--json", "{folder}"], "argument --json: got '{folder}'"),
        (["{blocks}:make", "--shape", "2,4,4,4", "--json", "{file}/x"], "argument --json: got '{file}/x'"),
        (["{blocks}:make", "--shape", "2,4,4,4", "--json", ""], "argument --json: got '', wanted a path"),
        (["{blocks}:make", "--input", "{file}"], "was not written by torch.save"),
        (["{blocks}:make", "--input", "{folder}"], "Is a directory"),
    ],
    "bench": [
        (["--device", "tpu"], "--device: got 'tpu', but this PyTorch sees only"),
        (["--device", "mps"], "--device: got 'mps'"),
        (["--device", "cuda:77", "--out", "{new}"], "--device: got 'cuda:77', but this PyTorch sees only"),
        (["--out", "{file}"], "is a file; wanted a folder"),
        (["--out", "{file}/below"], "is a file; wanted a folder"),
        (["--out", LONG], "File name too long"),
        (["--report", "{file}/below"], "is a file; wanted a folder"),
        (["--report", "{file}"], "argument --report"),
        (["--threads", "-1"], "argument --threads: got '-1'"),
        (["--budget", "1x"], "argument --budget"),
        (["--clock", "sun"], "argument --clock"),
        (["--clock", "cpu", "--threads", "2"], "argument --clock: got cpu"),
        (["--quik"], "did you mean --quick?"),
        (["--shape", "2,8"], "got --shape without --block"),
        (["--block", BLOCK + ":make"], "argument --shape: missing"),
        (["--block", BLOCK + ":make", "--shape", "2,x"], "argument --shape: got '2,x'"),
        (["--block", BLOCK + ":make", "--shape", "2,4,4,4", "--depths", "0"], "argument --depths"),
        (["--block", BLOCK + ":make", "--shape", "2,5,4,4"], "on an input of shape (2, 5, 4, 4)"),
        (["--block", BLOCK + ":make", "--shape", "2,4,4,4", "--modes"], "leave --modes out"),
        (["--block", BLOCK + ":absent", "--shape", "2,4,4,4"], "has no attribute 'absent'"),
        (["--block", BLOCK + ":NUMBER", "--shape", "2,4,4,4"], "which is a int; wanted a module or a function"),
        (["--block", BLOCK + ":linear", "--shape", "2,4,4,4"], "returned a Linear without inverse"),
        (["--block", BLOCK + ":text", "--shape", "2,4,4,4"], "returned a str; wanted an nn.Module"),
        (["--block", BLOCK + ":fails", "--shape", "2,4,4,4"], "fails() raised RuntimeError: no luck"),
        (["--block", BLOCK + ":smaller", "--shape", "2,4,4,4"], "wanted an output of the input's shape"),
        (["--block", "no.such.module:f", "--shape", "2,4,4,4"], "--block: no.such.module:f: cannot import no"),
        (["--block", "{missing}.py:f", "--shape", "2,4,4,4"], "there is no file"),
        (["--block", "nonsense", "--shape", "2,4,4,4"], "wanted package.module:factory"),
    ],
    "bench.gate": [
        ([], "BASE, NOW"),
        (["{missing}", "{baseline}"], "there is no such file"),
        (["{baseline}", "{missing}"], "there is no such file"),
        (["{baseline}", "{junk}"], "holds no measurements of python -m bench"),
        (["{baseline}", "{list}"], "holds no measurements of python -m bench"),
        (["{folder}", "{baseline}"], "holds no measurements of python -m bench"),
        (["{baseline}", "{baseline}", "--fail", "median:10%"], "holds only bytes and evaluations, and no time"),
        (["{baseline}", "{baseline}", "--fail", "nonsense:1%"], "BASE has no case with 'nonsense'"),
        (["{baseline}", "{baseline}", "--fail", "subject:1%"], "BASE has no case with 'subject'"),
        (["{baseline}", "{baseline}", "--fail", "median"], "wanted METRIC:PERCENT%"),
        (["{baseline}", "{baseline}", "--fail", "median:1"], "wanted METRIC:PERCENT%"),
        (["{baseline}", "{baseline}", "--fail", "median:-1%"], "wanted METRIC:PERCENT%"),
        (["{baseline}", "{baseline}", "--fail", ":1%"], "wanted METRIC:PERCENT%"),
        (["{folder}", "{baseline}", "--save"], "directory"),
    ],
    "bench.compare": [
        (["HEAD"], "COMMIT"),
        (["no-such-commit", "."], "got 'no-such-commit', which names no commit"),
        (["HEAD", "HEAD", "-k", "nothing"], "argument -k: got 'nothing', wanted a part of a case's name"),
        (["HEAD", "HEAD", "--rounds", "0"], "argument --rounds: got '0'"),
        (["HEAD", "HEAD", "--device", "tpu"], "--device: got 'tpu'"),
        (["HEAD", "HEAD", "--threads", "x"], "argument --threads: got 'x'"),
    ],
    "bench.report": [
        ([], "FILE.json"),
        (["{missing}", "--out", "{folder}"], "there is no such file"),
        (["{junk}", "--out", "{folder}"], "holds no measurements"),
        (["{folder}"], "folder holds no measurements"),
        (["{baseline}"], "wanted FILE.json with --out FOLDER"),
        (["{folder}", "--out", "{new}"], "wanted FILE.json with --out FOLDER"),
        (["{baseline}", "--out", "{new}"], "got a baseline of bench.gate"),
        (["{missing}"], "which is no folder, without --out"),
        (["{baseline}", "--out", "{file}"], "is a file; wanted a folder"),
    ],
    "bench.summary": [
        ([], "FILE.json"),
        (["{missing}"], "there is no such file"),
        (["{junk}"], "holds no measurements"),
        (["{baseline}"], "got a baseline of bench.gate"),
    ],
    "bench.figures": [([], "FILE.json"), (["{junk}"], "holds no measurements"), (["{junk}", "{file}"], "is a file")],
    "bench.network_laws": [
        (["--csv", "{file}/x"], "argument --csv: got"),
        (["--csv", "{folder}"], "argument --csv: got"),
        (["--only", "nothing"], "argument --only: invalid choice"),
    ],
    "bench.grids": [(["--csv", "{file}/x"], "argument --csv: got"), (["--csv", "{folder}"], "argument --csv: got")],
    "bench.networks_page": [
        (["extra"], "got 'extra', wanted only what the command takes"),
        (["--out", "x"], "got '--out x', wanted only what the command takes"),
    ],
    "bench.side_by_side": [
        (["--folder", "{missing}"], "no measurements in"),
        (["--folder", "{folder}"], "make some: python -m bench"),
        (["--folders", "x"], "mean --folder?"),
    ],
    "bench.peers": [
        (["--out", "{file}"], "is a file; wanted a folder"),
        (["--render", "--out", "{missing}"], "No such file"),
        (["--render", "--out", "{junk_run}"], "does not hold the results of this command"),
        (["--fast"], "got '--fast', wanted only what the command takes"),
    ],
    "bench.findings": [
        (["--out", "{file}"], "is a file; wanted a folder"),
        (["--render", "--out", "{junk_run}"], "does not hold the results of this command"),
    ],
    "bench.small_tensors": [
        (["--device", "tpu"], "wanted only what the command takes"),
        (["--seconds", "x"], "argument --seconds"),
    ],
    "bench.reference": [
        (["--networks", "alexnet"], "argument --networks: invalid choice: 'alexnet'"),
        (["--depths", "deep"], "argument --depths: got 'deep'"),
        (["--csv", "{file}/x"], "wanted a file in a folder that exists"),
    ],
    "bench.volumes": [
        (["--gib", "nan"], "argument --gib: got 'nan'"),
        (["--reserve", "30"], "--reserve: got 30 GiB of 24, wanted at least 0 and less than --gib"),
        (["--blocks", "0"], "argument --blocks"),
        (["--csv", "{file}/x"], "argument --csv: got"),
    ],
    "bench.reference_peers": [
        ([], "folder"),
        (["{file}"], "is a file; wanted a folder"),
        (["{folder}", "--rounds", "0"], "argument --rounds"),
        (["{folder}", "--csv", "{file}/x"], "argument --csv: got"),
    ],
    "bench.budget": [(["--peers", "{file}"], "is a file; wanted a folder"), (["--csv", "{file}/x"], "argument --csv")],
    "bench.memory": [
        ([], "MODEL: missing, wanted one of resnet32"),
        (["alexnet"], "argument MODEL: got 'alexnet', wanted one of resnet32"),
        (["no.such:f", "--shape", "1,3,8,8"], "argument MODEL: no.such:f: cannot import no"),
        (["torch.nn:ReLUs", "--shape", "1,2"], "no attribute 'ReLUs'"),
        (["builtins:int", "--shape", "1,2"], "returned int, wanted an nn.Module"),
        (["torch.nn:ReLU"], "--shape: missing, wanted the input's shape"),
        (["torch.nn:ReLU", "--shape", "1,x"], "got '1,x', wanted whole numbers, the batch first"),
        ([RESNET, "--shape", "4,2,8,8"], "wanted a model that takes one such tensor"),
        ([RESNET, "--shape", "4,3,8,8", "--disable"], "--disable: wanted one of the six networks"),
        (["revnet38", "--shape", "1,3,32,32"], "wanted --batch"),
        (["revnet38", "--batch", "0"], "argument --batch: got '0', wanted a whole number of at least 1"),
        (["revnet38", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["revnet38", "--device-memory", "24Gigs"], "got '24Gigs', wanted a size like 24GiB"),
        (["revnet38", "--device-memory", "1GiB"], "--reserve: got 1073741824 bytes, wanted less than --device-memory"),
        (["revnet38", "--json", "{file}/x"], "wanted a file in a folder that exists"),
        (["revnet38", "--out", "{new}"], "--out: wanted --table"),
        (["--table", "revnet38"], "got 'revnet38', wanted none with --table"),
        (["revnet38", "--json", "{folder}"], "which is a folder; wanted a file: add a name"),
        (["revnet38", "--json", LONG], "File name too long; choose a shorter name"),
        (["--table", "--out", "{missing}/x"], "wanted a file in a folder that exists"),
    ],
    "bench.measured_memory": [
        (["--networks", "alexnet"], "argument --networks: got alexnet, wanted some of resnet32"),
        (["--networks", ","], "argument --networks: got nothing"),
        (["--batch", "0"], "argument --batch"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--out", "{file}"], "is a file; wanted a folder"),
    ],
    "bench.speed": [
        (["--networks", "alexnet"], "argument --networks: got alexnet, wanted some of resnet32"),
        (["--seconds", "-3"], "argument --seconds: got '-3', wanted seconds above 0"),
        (["--seconds", "inf"], "argument --seconds: got 'inf'"),
        (["--out", "{file}"], "is a file; wanted a folder"),
        (["--device", "cuda:99"], "--device: got 'cuda:99'"),
        (["--group", "2", "--device", "cpu", "--out", "{new}"], "--group: got 2 on cpu, wanted a GPU"),
        (["--device", "cpu", "--out", "{junk_run}"], "speed.csv: missing columns batch"),
    ],
    "bench.narrow_conv": [
        (["--networks", "alexnet"], "argument --networks: got alexnet"),
        (["--batch", "-1"], "argument --batch"),
    ],
    "bench.gpu_day": [
        (["--stages", "tests,coffee", "--out", "{new}"], "argument --stages: got coffee, wanted some of tests"),
        (["--device", "cpu", "--out", "{new}"], "--device: got cpu, wanted a GPU"),
        (["--device", "cuda:77", "--out", "{new}"], "--device: got 'cuda:77', but this PyTorch sees only"),
        (["--group", "0"], "argument --group"),
        (["--budget", "x"], "argument --budget"),
        (["--out", "{file}"], "is a file; wanted a folder"),
    ],
    "bench.reproduce_table": [
        (["--out", "{file}"], "is a file; wanted a folder"),
        (["--runs", "{file}"], "is a file; wanted a folder"),
        (["--models", "alexnet"], "argument --models: got alexnet, wanted some of resnet32"),
        (["--models", ","], "argument --models: got nothing"),
        (["--datasets", "mnist"], "argument --datasets: got mnist"),
        (["--recipe", "quick"], "argument --recipe: invalid choice: 'quick'"),
        (["--budget", "soon"], "argument --budget: got 'soon'"),
        (["--threads", "0"], "argument --threads: got '0'"),
        (["--nonsense"], "got '--nonsense'"),
        (["--seeds", "3-1"], "argument --seeds: got '3-1'"),
        (["--seeds", "a"], "argument --seeds: got 'a'"),
        (["--seeds", "-1"], "argument --seeds"),
        (["--seeds", "0-99999999999"], "argument --seeds"),
        (["--device", "tpu"], "--device: got 'tpu'"),
        (["--devices", ","], "argument --devices: got ',', wanted devices like 0,1 or cpu"),
        (["--train", "--jobs-per-device", "0"], "argument --jobs-per-device"),
        (["--plan", "--train"], "got --plan and --train"),
        (["--records", "{file}"], "argument --records"),
        (["--records", "{missing}"], "which does not exist; wanted a folder"),
        (["--runs", "{missing}"], "which does not exist; wanted a folder of runs"),
        (["--runs", ""], "got '', wanted a path"),
        (["--out", " "], "got ' ', wanted a path"),
        (["--train", "--runs", "{file}/below"], "is a file; wanted a folder"),
    ],
    "reports.readme": [(["now"], "got 'now'")],
    "properties.zoo": [(["--out", "{missing}/x.md"], "wanted a file in a folder that exists")],
    "properties.faults": [
        (["--only", "nothing"], "argument --only: got 'nothing'"),
        (["--tries", "0"], "argument --tries"),
        (["--seed", "x"], "argument --seed"),
    ],
}
BLOCKS = """
from torch import nn
import memcnn
NUMBER = 3
def make(): return memcnn.AdditiveCoupling(nn.Conv2d(2, 2, 1))
def linear(): return nn.Linear(2, 2)
def text(): return "block"
def fails(): raise RuntimeError("no luck")
def smaller(): return memcnn.SpaceToDepth(2)
"""


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[str, Path]:
    """Return the paths that the words in braces stand for."""
    root = tmp_path_factory.mktemp("bad input")
    found = {name: root / name for name in ("missing", "new", "folder", "file", "junk", "list", "junk_run")}
    found |= {
        "blocks": root / "blocks_for_bad_input.py",
        "baseline": Path(__file__).parents[2] / "bench" / "baselines" / "cpu.json",
    }
    for name in ("folder", "junk_run"):
        found[name].mkdir()
    found["file"].write_text("text")
    found["junk"].write_text('{"benchmarks": [')
    found["list"].write_text("[1, 2]")
    for name in ("record.json", "peers.json", "findings.json"):
        (found["junk_run"] / name).write_text(json.dumps({"layers": 3}))
    (found["junk_run"] / "speed.csv").write_text("a,b\n1,2\n")
    found["blocks"].write_text(BLOCKS)
    return found


def main_of(command: str):
    """Return the function behind ``python -m command``."""
    for name in (f"{command}.__main__", command):
        try:
            return importlib.import_module(name).main
        except (ModuleNotFoundError, AttributeError):
            continue
    raise AssertionError(f"{command} has no main")


def outcome(command: str, words: list[str], capsys) -> tuple[int, str]:
    """Run a command in this process; return its exit status and what it printed on standard error."""
    try:
        status = main_of(command)(words)
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr().err


def contents(root: Path) -> dict[Path, bytes | None]:
    """Return all paths below a folder, and the content of files. Python's own caches are left out."""
    paths = (path for path in root.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


CASES = [(command, words, part) for command, cases in COMMANDS.items() for words, part in cases]


@pytest.mark.parametrize(("command", "words", "part"), CASES, ids=[f"{c} {' '.join(w)[:60]}" for c, w, _ in CASES])
def test_bad_input_ends_with_status_2_and_plain_lines(command, words, part, places, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = contents(places["folder"].parent)
    status, text = outcome(command, [word.format(**places) for word in words], capsys)
    assert status == cli.MISUSE
    assert part.format(**places) in text and "Traceback" not in text and "usage:" not in text
    assert len([line for line in text.splitlines() if not line.endswith(" ...")]) <= 2, "beside lines of progress"
    assert contents(places["folder"].parent) == before, "something was written"


@pytest.mark.parametrize("command", [*COMMANDS])
def test_every_command_prints_its_version(command, capsys):
    with pytest.raises(SystemExit) as end:
        main_of(command)(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out.startswith("memcnn ")


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(Exception, match="cannot be written to; wanted a folder that can"):
        cli.output_folder(str(tmp_path / "below"))
    with pytest.raises(Exception, match="cannot be read; wanted a folder that can"):
        cli.input_folder(str(tmp_path))


def test_what_the_system_refuses_is_explained(capsys):
    @cli.command("memcnn.test")
    def main(arguments):
        raise arguments

    assert main(PermissionError(13, "Permission denied", "x.json")) == cli.MISUSE
    assert main(OSError(28, "No space left on device", "y.json")) == cli.FAILED
    assert main(KeyboardInterrupt()) == cli.INTERRUPTED
    assert capsys.readouterr().err.splitlines() == [
        "memcnn.test: x.json: Permission denied; choose a place that you may read and write",
        "memcnn.test: y.json: No space left on device; make room or choose another place, and run the command again",
        "memcnn.test: interrupted",
    ]
