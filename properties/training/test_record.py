"""A run record is read as it was written; a bad record raises an error with its file and the reason."""

import errno
import json
import os
from dataclasses import fields, replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import reports
from memcnn import data as cifar
from memcnn.models.resnet import MODELS
from memcnn.training import files, record
from memcnn.training.recipe import PUBLISHED, SMOKE, override
from memcnn.training.record import BadRecord, RunRecord, Segment, load, load_all, run_name
from properties.support.records import (
    FAILED,
    FULL,
    GENERATED,
    GPU,
    INCONSISTENT,
    KINDS,
    PARTIAL,
    changed,
)


@pytest.mark.parametrize("written", KINDS.values(), ids=KINDS)
def test_a_record_comes_back_as_it_was_written(tmp_path, written):
    path = written.write(tmp_path)
    assert path == tmp_path / "record.json"
    assert load(tmp_path) == load(path) == written


@pytest.mark.parametrize("folder", sorted((Path(reports.__file__).parent / "records").glob("*/record.json")), ids=str)
def test_the_committed_records_are_valid_and_their_folders_have_their_names(folder):
    assert load(folder).name == folder.parent.name


def test_only_a_complete_published_run_on_official_data_with_the_engine_is_full():
    assert FULL.is_comparable
    assert not PARTIAL.is_comparable and not FAILED.is_comparable
    assert not changed(FULL, data={**FULL.data, "official": False}).is_comparable
    assert not changed(FULL, engine=False).is_comparable
    two = {**FULL.device, "count": 2}
    assert not changed(FULL, device=two).is_comparable, "each process normalises by its own half of a batch"
    assert changed(FULL, device=two, software={**FULL.software, "execution": "bf16, sync-batch-norm"}).is_comparable
    for change in ({"pad": 3}, {"test_images": 100}, {"evaluate_every": 100}, {"learning_rate": 0.2}):
        recipe = replace(PUBLISHED, **change)  # the name is unchanged, but the values count
        assert not changed(FULL, recipe=recipe).is_comparable


@pytest.mark.parametrize(("name", "change"), INCONSISTENT)
def test_an_inconsistent_record_is_refused_by_field(tmp_path, name, change):
    with pytest.raises(ValueError, match=f"^{name}: got "):
        changed(FULL, **change)
    values = json.loads(FULL.write(tmp_path).read_text())
    (tmp_path / "record.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(BadRecord, match=f"record.json: {name}: got "):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", pytest.param("[" * 99_999, id="deep"), "[]", "3", '{"schema": 2}', '{"schema": 1}', "\0", "{}"]
)
def test_a_file_that_is_no_record_is_refused_by_name(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(BadRecord, match="record.json: "):
        load(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
paths = st.sampled_from(
    [(field.name,) for field in fields(RunRecord)]
    + [("segments", 0)]
    + [("segments", 0, field.name) for field in fields(Segment)]
    + [("recipe", name) for name in PUBLISHED.to_dict()]
    + [(name, key) for name in ("device", "software", "data") for key in getattr(FULL, name)]
)


@given(path=paths, value=json_values, remove=st.booleans())
def test_a_record_with_a_random_field_is_valid_or_refused(tmp_path_factory, path, value, remove):
    folder = tmp_path_factory.mktemp("run")
    values = json.loads(FULL.write(folder).read_text())
    parent = values
    for key in path[:-1]:
        parent = parent[key]
    if remove:
        del parent[path[-1]]
    else:
        parent[path[-1]] = value
    (folder / "record.json").write_text(json.dumps(values))
    try:
        found = load(folder)
    except BadRecord as error:
        assert str(folder) in str(error)  # noqa: PT017 - either of the two may happen
    else:
        found.write(folder)
        assert load(folder) == found


@given(content=st.binary(max_size=40))
def test_a_file_of_random_bytes_raises_only_bad_record(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("run") / "record.json"
    path.write_bytes(content)
    with pytest.raises(BadRecord, match="record.json"):
        load(path)


def test_all_records_are_found_and_bad_ones_reported(tmp_path):
    runs, committed = tmp_path / "runs", tmp_path / "records"
    names = {"b": FULL, "a": PARTIAL, "a.old-1": FULL, "d": changed(FULL, seed=1)}
    for name, some in names.items():
        folder = (committed if name == "d" else runs) / name
        folder.mkdir(parents=True)
        some.write(folder)
    (runs / "broken").mkdir()
    (runs / "broken" / "record.json").write_text("{")
    (runs / "just started").mkdir()
    records, problems = load_all(runs, committed, tmp_path / "missing")
    assert records == [(committed / "d", names["d"]), (runs / "a", PARTIAL), (runs / "b", FULL)]
    assert len(problems) == 1 and str(runs / "broken" / "record.json") in problems[0]


@given(
    one=st.tuples(
        st.sampled_from(list(MODELS)), st.sampled_from(record.DATASETS), st.integers(1, 3), st.integers(0, 3)
    ),
    two=st.tuples(
        st.sampled_from(list(MODELS)), st.sampled_from(record.DATASETS), st.integers(1, 3), st.integers(0, 3)
    ),
)
def test_different_runs_have_different_folders(one, two):
    def name(model, dataset, iterations, seed):
        return run_name(model, dataset, override(SMOKE, iterations=iterations), seed)

    assert (name(*one) == name(*two)) == (one == two)
    assert run_name("revnet38", "cifar10", PUBLISHED, 0) == "revnet38-cifar10-published-s0"


def test_runs_that_compute_something_else_have_their_own_folders():
    ways = list(product(record.DATA_SUFFIXES, (True, False), (1, 2, 12)))
    names = [
        run_name("revnet38", "cifar10", PUBLISHED, 0, data=data, engine=engine, processes=processes)
        for data, engine, processes in ways
    ]
    assert len(set(names)) == len(ways) == 18
    assert names[ways.index(("generated", True, 1))] == "revnet38-cifar10-published-s0-generated"
    assert names[ways.index(("unofficial", False, 2))] == "revnet38-cifar10-published-s0-unofficial-plain-p2"
    with pytest.raises(ValueError, match="data: got 'own', wanted one of official, generated, unofficial"):
        run_name("revnet38", "cifar10", PUBLISHED, 0, data="own")
    with pytest.raises(ValueError, match="processes: got 0"):
        run_name("revnet38", "cifar10", PUBLISHED, 0, processes=0)


def test_a_record_knows_the_name_of_its_folder():
    assert FULL.name == "revnet38-cifar10-published-s0"
    assert changed(FULL, data=GENERATED, engine=False).name == FULL.name + "-generated-plain"
    unofficial = {"official": False, "checksums": {"test_batch": "00"}}
    assert changed(FULL, data=unofficial, device={**GPU, "count": 4}).name == FULL.name + "-unofficial-p4"


@pytest.mark.parametrize(("official", "checksums", "kind"), [
    (True, {"test_batch": "00"}, "official"), (False, {"test_batch": "00"}, "unofficial"),
    (False, {"generated": "00"}, "generated"),
])  # fmt: skip
def test_data_sets_know_their_kind(official, checksums, kind):
    assert replace(cifar.generate(10, train=1, test=1), official=official, checksums=checksums).kind == kind


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    FULL.write(tmp_path)

    def crash(*arguments):
        raise KeyboardInterrupt

    for step in ("fsync", "replace"):
        monkeypatch.setattr(files.os, step, crash)
        with pytest.raises(KeyboardInterrupt):
            PARTIAL.write(tmp_path)
        assert load(tmp_path) == FULL
        monkeypatch.undo()
    PARTIAL.write(tmp_path)
    assert load(tmp_path) == PARTIAL
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_on_a_full_disk_the_error_names_the_file_and_no_other_file_is_left(tmp_path, monkeypatch, step):
    path, previous = tmp_path / "record.json", tmp_path / "previous"
    path.write_text("old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="record.json") as raised:
        files.write_by_rename(path, b"new", keep=previous)
    monkeypatch.undo()
    assert raised.value.errno == errno.ENOSPC
    assert path.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["record.json"]
    files.write_by_rename(path, b"new", keep=previous)
    assert (path.read_text(), previous.read_text()) == ("new", "old")
