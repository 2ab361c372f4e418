"""The segments of a run: their execution, how many runs shared the device, and faults that are refused."""

import json
from dataclasses import asdict, replace

import pytest

from memcnn.training.record import BadRecord, Segment, load
from properties.support.records import (
    FULL,
    GENERATED,
    GPU,
    MIXED,
    ONE,
    OTHER,
    PARTIAL,
    PURE,
    TWO,
    VERSIONS,
    changed,
    in_segments,
)
from properties.support.runs import without


def test_a_new_record_has_one_segment():
    (part,) = changed(FULL, software={**FULL.software, "execution": "bf16, compile"}).segments
    assert (part.first, part.last, part.train_seconds, part.shared_by) == (0, 80_000, 6660.0, 1)
    assert (part.device, part.software, part.commit, part.clean) == (FULL.device, VERSIONS, "c0ffee", True)
    assert part.execution == "bf16, compile"
    assert FULL.segments[0].execution == "float32", "the execution of records that name none"


def test_a_run_whose_segments_were_executed_differently_is_mixed_and_not_full():
    on_cpu = replace(TWO, device=FULL.device)
    elsewhere = replace(TWO, device={**GPU, "name": "another GPU"}, software={**VERSIONS, "torch": "3"})
    unused = replace(OTHER, last=30_000, train_seconds=0.0)
    for segments, mixed in (
        ([replace(ONE, last=80_000)], False),
        ([ONE, TWO], False),
        ([ONE, OTHER], True),
        ([ONE, on_cpu], True),
        ([ONE, elsewhere], False),
        ([ONE, unused, TWO], False),
    ):
        found = in_segments(*segments)
        assert found.mixed == mixed
        assert found.is_comparable == (not mixed)
        assert found.mark == (" (mixed execution)" if mixed else "")
    assert changed(FULL, data=GENERATED).mark == " (generated data)"
    assert replace(MIXED, data=GENERATED).mark == " (generated data) (mixed execution)"


def test_shared_by_is_the_largest_number_of_any_segment():
    assert FULL.shared_by == 1
    assert in_segments(ONE, TWO).shared_by == 4
    assert in_segments(replace(ONE, shared_by=1), TWO).shared_by == 2


def test_a_record_of_schema_1_has_one_segment(tmp_path):
    values = json.loads(PARTIAL.write(tmp_path).read_text())
    del values["segments"]
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**values, "schema": 1}))
    assert load(path) == PARTIAL
    assert load(path).segments[0].last == 700
    path.write_text(json.dumps(values))
    with pytest.raises(BadRecord, match="missing fields \\['segments'\\]"):
        load(path)


def test_a_record_of_schema_1_on_a_gpu_names_the_deterministic_kernels_that_it_used(tmp_path):
    values = json.loads(PARTIAL.write(tmp_path).read_text())
    del values["segments"]
    values |= {"schema": 1, "software": {**values["software"], "execution": "bf16, graph"}}
    (tmp_path / "record.json").write_text(json.dumps(values))
    assert load(tmp_path).segments[0].execution == "bf16, graph"
    values["device"]["type"] = "cuda"
    (tmp_path / "record.json").write_text(json.dumps(values))
    assert load(tmp_path).segments[0].execution == "bf16, graph, deterministic"


BAD_SEGMENTS = [
    ("a list of at least one", lambda one, two: []),
    ("a list of at least one", lambda one, two: {"first": one}),
    ("number 1: segment: got 3, wanted an object", lambda one, two: [3, two]),
    ("number 2: missing fields .*'shared_by'", lambda one, two: [one, without(two, "shared_by")]),
    ("number 2: .*unknown .*'speed'", lambda one, two: [one, {**two, "speed": 1}]),
    ("first of number 1: got 1, wanted 0", lambda one, two: [{**one, "first": 1}, two]),
    ("first of number 2: got 29999, wanted 30000", lambda one, two: [one, {**two, "first": 29_999}]),
    ("first of number 2: got 30001, wanted 30000", lambda one, two: [one, {**two, "first": 30_001}]),
    ("first of number 1: got 30000, wanted 0", lambda one, two: [two]),
    ("last of the last: got 30000, wanted 80000", lambda one, two: [one]),
    ("number 1: last: got 30000, wanted at least 30001", lambda one, two: [{**one, "first": 30_001}, two]),
    ("number 1: first: got -1", lambda one, two: [{**one, "first": -1}, two]),
    ("number 1: first: got 0.5", lambda one, two: [{**one, "first": 0.5}, two]),
    ("number 1: execution: got None", lambda one, two: [{**one, "execution": None}, two]),
    ("number 1: shared_by: got 0", lambda one, two: [{**one, "shared_by": 0}, two]),
    ("number 1: train_seconds: got -1", lambda one, two: [{**one, "train_seconds": -1}, two]),
    ("sum of train_seconds: got 3000.25, wanted 3000.75", lambda one, two: [{**one, "train_seconds": 1000}, two]),
    ("number 1: device: got", lambda one, two: [{**one, "device": {"type": "cpu"}}, two]),
    ("number 1: device.count: got 0", lambda one, two: [{**one, "device": {**GPU, "count": 0}}, two]),
    ("number 2: software: got", lambda one, two: [one, {**two, "software": {}}]),
    ("device of the last: got", lambda one, two: [one, {**two, "device": FULL.device}]),
    ("commit of the last: got", lambda one, two: [one, {**two, "commit": "beef"}]),
    ("clean of the last: got", lambda one, two: [one, {**two, "clean": None}]),
    ("software and execution of the last: got", lambda one, two: [one, {**two, "execution": "tf32"}]),
]


@pytest.mark.parametrize(("message", "spoil"), BAD_SEGMENTS, ids=[message for message, _ in BAD_SEGMENTS])
def test_impossible_segments_are_refused_with_the_reason(tmp_path, message, spoil):
    values = json.loads(PURE.write(tmp_path).read_text())
    values["segments"] = spoil(*values["segments"])
    (tmp_path / "record.json").write_text(json.dumps(values))
    with pytest.raises(BadRecord, match=f"record.json: segments: .*{message}"):
        load(tmp_path)


def test_a_segment_survives_a_dictionary():
    assert Segment.from_dict(json.loads(json.dumps(asdict(ONE)))) == ONE
