"""If the process of a contender or a layer fails, the command names it, leaves it out, and measures the others."""

import json

import pytest

from bench.audit import findings, peer_tables, peers
from bench.audit.peer.chains import ROOT
from bench.worker import Failed


class Scripted:
    """A worker that fails at the question number ``fails_at``."""

    def __init__(self, name: str, fails_at: int | None = None):
        self.name, self.fails_at, self.asked, self.ended = name, fails_at, 0, 0

    def ask(self, question: str, **arguments) -> dict:
        self.asked += 1
        if self.asked == self.fails_at:
            raise Failed(f"{self.name}: the process ended at {question!r}\n  last words")
        return {"seconds": [1.0, 2.0], "peak_bytes": 5}

    def end(self) -> None:
        self.ended += 1


def test_a_contender_that_fails_is_left_out_from_there_on(capsys):
    running = peers.Contenders([Scripted("a"), Scripted("b", fails_at=3), Scripted("c")], [])
    rows = peers.measure_time(running, 4, 4, {"batch": 1, "channels": 4, "side": 4})
    order = [(row["round"], row["contender"]) for row in rows]
    assert order == [(number, name) for number, names in enumerate(("abc", "bca", "ca", "ca")) for name in names]
    assert [worker.name for worker in running.workers] == ["a", "c"]
    assert running.failures == [{"contender": "b", "reason": "b: the process ended at 'step'\n  last words"}]
    assert "left out: b: the process ended at 'step'\n  last words" in capsys.readouterr().err
    memory = peers.measure_memory(running, 4, {})
    assert [row["contender"] for row in memory] == ["a", "c"] and len(running.failures) == 1


def test_the_page_of_peers_names_it_and_keeps_what_was_measured():
    result = json.loads((ROOT / "reports" / "peers.json").read_text("utf-8"))
    whole = peer_tables.render(result)
    assert "## Failed" not in whole
    result["memory"] = [row for row in result["memory"] if row["contender"] != "RevLib" or row["blocks"] < 32]
    result["work"] = [row for row in result["work"] if row["contender"] != "RevLib"]
    page = peer_tables.render(
        {**result, "failures": [{"contender": "RevLib", "reason": "RevLib: ended\n  last words"}]}
    )
    assert page.endswith("* RevLib: ended last words\n") and "nan" not in page
    [before], [after] = ([line for line in text.splitlines() if line.startswith("| RevLib ") and "[" in line][:1]
                         for text in (whole, page))  # fmt: skip
    assert before.split("|")[:5] == after.split("|")[:5] and before != after


def test_a_layer_whose_check_ends_the_process_is_left_out_and_the_next_ones_are_checked(monkeypatch, capsys):
    started = []

    class Checker(Scripted):
        def ask(self, question: str, **arguments) -> dict:
            if question == "layers":
                return {"layers": ["First", "Crashes", "Last"]}
            if arguments == {"number": 1, "mode": "train"}:
                raise Failed("package: the process was ended by signal 11 at 'check'")
            return {"layer": arguments["number"], "mode": arguments["mode"], "columns": {}}

    def start(package: str) -> Checker:
        started.append(Checker(package))
        return started[-1]

    monkeypatch.setattr(findings, "start", start)
    rows = [(row["layer"], row["mode"]) for row in findings.check_layers("package")]
    assert rows == [(0, "train"), (0, "eval"), (1, "eval"), (2, "train"), (2, "eval")]
    assert "Crashes (train) is left out: package: the process was ended by signal 11" in capsys.readouterr().err
    assert len(started) == 2 and all(worker.ended for worker in started)


def test_a_package_that_cannot_be_imported_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(findings, "start", lambda package: Scripted(package, fails_at=1))
    assert findings.check_layers("package") == []
    assert "package is left out: package: the process ended" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["plain", "upstream"])
def test_a_contender_runs_alone_in_its_own_environment(name, monkeypatch):
    seen = {}
    monkeypatch.setattr(peers, "Worker", lambda *arguments, interpreter: seen.update(interpreter=interpreter))
    peers.start(name)
    interpreter = seen["interpreter"]
    assert interpreter.options == ("-I",) and not interpreter.keep_root and interpreter.root == ROOT
    assert (str(peers.VENV) in str(interpreter.python)) == (name == "upstream")
