"""Tests of ``bench.worker``: a worker answers questions; its failures are reported, and affect no other worker."""

import sys
import time
from pathlib import Path

import pytest

from bench.worker import Failed, Interpreter, Worker

SUBJECT = """
import os, sys, time

print("printed on import")

class Subject:
    def __init__(self, word):
        self.word = word

    def echo(self, **arguments):
        print("printed before the answer")
        return {"word": self.word, **arguments}

    def fail(self):
        raise KeyError("planted")

    def end(self, status):
        for number in range(20):
            print("line", number, file=sys.stderr)
        sys.stderr.flush()
        os._exit(status)

    def crash(self):
        os.kill(os.getpid(), 9)

    def chatter(self):
        for _ in range(20000):
            print("a line of some twenty characters", file=sys.stderr)
        return {}

    def path(self):
        return {"path": sys.path, "isolated": sys.flags.isolated}

    def hang(self, pid_file):
        child = os.fork()
        if child:
            with open(pid_file, "w") as file:
                file.write(f"{os.getpid()} {child}")
        time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """Start workers whose object is a ``Subject``, and end them after the test."""
    (tmp_path / "subject.py").write_text(SUBJECT)
    started = []

    def start(target: str = "subject:Subject", **options) -> Worker:
        started.append(Worker("the worker", target, "a word", interpreter=Interpreter(tmp_path, **options)))
        return started[-1]

    yield start
    for worker in started:
        worker.end()
        assert worker.process.poll() is not None


def test_a_worker_answers_and_its_printed_lines_are_not_answers(start):
    worker = start()
    assert worker.ask("echo", number=3, words=["a"]) == {"word": "a word", "number": 3, "words": ["a"]}
    assert worker.ask("echo") == {"word": "a word"}


def test_a_worker_answers_after_a_question_that_failed(start):
    worker = start()
    with pytest.raises(Failed, match="^the worker: KeyError: 'planted'$"):
        worker.ask("fail")
    with pytest.raises(Failed, match="no attribute 'nothing'"):
        worker.ask("nothing")
    assert worker.ask("echo") == {"word": "a word"}


def test_the_message_quotes_the_last_lines_of_an_ended_workers_standard_error(start):
    worker = start()
    quoted = "".join(f"\n  line {number}" for number in range(15, 20))
    with pytest.raises(Failed, match=f"^the worker: the process ended with status 7 at 'end'{quoted}$"):
        worker.ask("end", status=7)
    with pytest.raises(Failed, match="ended with status 7 at 'echo'"):
        worker.ask("echo")


def test_the_message_names_the_signal_and_another_worker_continues(start):
    first, second = start(), start()
    with pytest.raises(Failed, match="was ended by signal 9 at 'crash'"):
        first.ask("crash")
    assert second.ask("echo") == {"word": "a word"}


def test_the_message_says_why_a_worker_could_not_start(start):
    with pytest.raises(
        Failed, match="ended with status 1 at 'echo'(\n.*)*ModuleNotFoundError: No module named 'nowhere'"
    ):
        start("nowhere:Subject").ask("echo")


def test_a_worker_without_an_answer_in_time_is_killed_with_its_children(start, tmp_path):
    worker = start()
    assert worker.ask("echo")
    started = time.monotonic()
    with pytest.raises(Failed, match="the worker: no answer to 'hang' within 2 s"):
        worker.ask("hang", pid_file=str(tmp_path / "pids"), limit_seconds=2)
    assert time.monotonic() - started < 20
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        deadline = time.monotonic() + 10
        while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
            assert time.monotonic() < deadline, f"{pid} still runs"
            time.sleep(0.05)
    with pytest.raises(Failed):
        worker.ask("echo")


def test_a_long_standard_error_does_not_block_a_worker(start):
    assert start().ask("chatter", limit_seconds=60) == {}


def test_the_root_is_first_on_the_search_path_or_removed_from_it(start, tmp_path):
    here = str(Path(__file__).resolve().parents[2] / "bench")
    assert start().ask("path")["path"][0] == str(tmp_path)
    assert here not in start().ask("path")["path"]
    found = start(keep_root=False, options=("-I",), python=sys.executable).ask("path")
    assert found["isolated"] and str(tmp_path) not in found["path"] and here not in found["path"]


def test_variables_are_added_to_the_environment(start, tmp_path, monkeypatch):
    monkeypatch.setenv("MEMCNN_TEST", "outer")
    (tmp_path / "other.py").write_text(
        "import os\n\nclass Other:\n    def __init__(self, word):\n        pass\n\n"
        "    def get(self):\n        return {'value': os.environ['MEMCNN_TEST']}\n"
    )
    assert start("other:Other").ask("get") == {"value": "outer"}
    assert start("other:Other", environment={"MEMCNN_TEST": "inner"}).ask("get") == {"value": "inner"}
