"""A map from each line of ``memcnn/engine`` and ``memcnn/models`` to its tests, and the seconds of each test."""

import json
import os
from collections import defaultdict
from pathlib import Path

import coverage
import pytest

from properties.mutation.selection import OPTIONS, in_a_fork


class Recorder:
    """A pytest plugin that names each test to ``recording`` and adds up its processor seconds."""

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


def record(test_file: str, target: Path) -> None:
    """Write the seconds of each test and the tests of each line as JSON; the tests must pass."""
    recording = coverage.Coverage(data_file=None, source=["memcnn/engine", "memcnn/models"])
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


def recorded(test_files: list[str], folder: Path) -> dict:
    """Return the records of all files. They are kept in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds, tests = {}, defaultdict(lambda: defaultdict(list))
    for file in test_files:
        target = folder / f"{Path(file).stem}.json"
        if not target.exists():
            status, output = in_a_fork(lambda file=file, target=target: record(file, target))
            if status:
                raise SystemExit(output)
        found = json.loads(target.read_text())
        seconds |= found["seconds"]
        for path, lines in found["tests"].items():
            for line, names in lines.items():
                tests[path][int(line)] += names
    return {"seconds": seconds, "tests": tests}
