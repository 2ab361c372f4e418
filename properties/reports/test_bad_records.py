"""The report names each record or curve that it cannot use, with the reason, and all others count."""

import json
import os
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="session")
def build(tmp_path_factory, full, put):
    """Return a function that builds a report of a good run and of one whose record.json has the given bytes."""

    def make(content: bytes):
        root = tmp_path_factory.mktemp("runs")
        put(root, full(test_accuracy=91.23))
        (root / "spoilt").mkdir()
        (root / "spoilt" / "record.json").write_bytes(content)
        report = reports.build(root, root / "none")
        assert reports.terminal(report)
        return report

    return make


def left_out(report) -> bool:
    """Return True if the report names the spoilt record with a reason; check that only the good one counts."""
    assert len(report.runs) == 1 and report.results.loc[("cifar10", "resnet32"), "mean_percent"] == 91.23
    [problem] = report.problems
    return "spoilt/record.json: " in problem and not problem.endswith(": ")


@given(content=st.binary(max_size=40))
def test_bytes_that_are_no_record_are_left_out_by_name_and_reason(build, content):
    assert left_out(build(content))


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"schema": 2}', '{"schema": 1}', '"x"', "1e999"])
def test_json_that_is_no_record_is_left_out_by_name_and_reason(build, text):
    assert left_out(build(text.encode()))


@given(data=st.data(), value=anything)
def test_a_record_with_a_spoilt_field_is_never_a_crash(build, full, tmp_path_factory, data, value):
    values = json.loads(full().write(tmp_path_factory.mktemp("record")).read_text())
    place = data.draw(st.sampled_from([values, values["recipe"], values["device"], values["software"], values["data"]]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    report = build(json.dumps(values).encode())
    assert len(report.runs) + len(report.problems) == 2


@given(name=st.data())
def test_a_record_without_one_of_its_fields_is_left_out(build, full, tmp_path_factory, name):
    values = json.loads(full().write(tmp_path_factory.mktemp("record")).read_text())
    del values[name.draw(st.sampled_from(sorted(values)))]
    assert left_out(build(json.dumps(values).encode()))


def test_a_record_nested_without_end_is_left_out(build):
    assert left_out(build(b"[" * 100_000))


@pytest.mark.parametrize(
    ("curve", "reason"),
    [
        ("", "No columns"),
        ("epoch,loss\n1,2\n", "test_accuracy"),
        ("epoch,test_accuracy\n1,high\n2,50\n3,60\n", "high"),
        ("epoch,test_accuracy\n1,50\n2,500\n3,60\n", "outside 0 to 100"),
        ("epoch,test_accuracy\n-1,50\n2,50\n3,60\n", "below 0"),
        ("epoch,test_accuracy\n1,50\n2,50,3,4\n", "Expected 2 fields"),
        ("epoch,test_accuracy\n\x00\x01,\xff\n1,2\n3,4\n", ""),
    ],
)
def test_a_bad_curve_is_reported_and_its_run_still_counts(tmp_path, full, put, curve, reason):
    folder = put(tmp_path, full(), curve)
    report = reports.build(tmp_path, tmp_path / "none")
    [problem] = report.problems
    assert problem.startswith(f"{folder / 'curve.csv'}: ") and reason in problem
    assert report.curves == [] and report.results.loc[("cifar10", "resnet32"), "n"] == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file system that takes any byte in a name")
def test_a_run_in_a_folder_whose_name_is_no_text_is_no_crash(tmp_path, full):
    folder = tmp_path / os.fsdecode(b"run-\xff")
    folder.mkdir()
    full().write(folder)
    report = reports.build(tmp_path, tmp_path / "none")
    assert "run-?" in reports.write(report, tmp_path / "out")[-1].read_text()


def test_no_folder_and_no_record_leave_the_published_columns_and_the_command(tmp_path):
    report = reports.build(tmp_path / "none", tmp_path / "neither")
    assert report.problems == [] and report.runs.empty
    for path in reports.write(report, tmp_path / "out")[:4:3]:
        text = path.read_text()
        assert all(number in text for number in ("92.74", "13:12", "76.90", "2,452.8"))
        assert "python -m bench.reproduce_table --train --seeds 0-2" in text
    assert "python -m bench.reproduce_table --train --seeds 0-2" in reports.terminal(report)
