"""A map from each line of the mutated folders to the tests that execute it, and the processor seconds of each test."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import coverage
import pytest

from properties.mutation.selection import OPTIONS, in_a_fork


class Recorder:
    """A pytest plugin that records the lines that each test executes, and measures its processor seconds."""

    def __init__(self, recording: coverage.Coverage):
        self.recording = recording
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        self.recording.switch_context(item.nodeid)
        before = sum(os.times()[:4])
        done = yield
        self.seconds[item.nodeid] = round(sum(os.times()[:4]) - before, 3)
        return done


def record(test_file: str, folders: Sequence[str], target: Path) -> None:
    """Write the seconds of each test, and the tests of each line of ``folders``, as JSON. The tests must pass."""
    recording = coverage.Coverage(data_file=None, source=list(folders))
    recorder = Recorder(recording)
    recording.start()
    status = pytest.main([*OPTIONS, test_file], plugins=[recorder])
    recording.stop()
    if status:
        raise SystemExit(f"without any mutation {test_file} must pass")
    data = recording.get_data()
    lines = {
        str(Path(file).relative_to(Path.cwd())): {
            line: sorted(filter(None, names)) for line, names in data.contexts_by_lineno(file).items()
        }
        for file in sorted(data.measured_files())
    }
    target.write_text(json.dumps({"seconds": recorder.seconds, "tests": lines}))


def recorded(test_files: list[str], folders: Sequence[str], kept_in: Path) -> dict:
    """Return the records of all test files, and keep them in the folder ``kept_in``."""
    kept_in.mkdir(parents=True, exist_ok=True)
    seconds, tests = {}, defaultdict(lambda: defaultdict(list))
    for file in test_files:
        target = kept_in / f"{'.'.join(Path(file).with_suffix('').parts)}.json"
        if not target.exists():
            status, output = in_a_fork(lambda file=file, target=target: record(file, folders, target))
            if status:
                raise SystemExit(output)
        found = json.loads(target.read_text())
        seconds |= found["seconds"]
        for path, lines in found["tests"].items():
            for line, names in lines.items():
                tests[path][int(line)] += names
    if not any(names for lines in tests.values() for names in lines.values()):
        raise SystemExit(f"no test executes a line of {', '.join(folders)}: the tests import another copy of it")
    return {"seconds": seconds, "tests": tests}
