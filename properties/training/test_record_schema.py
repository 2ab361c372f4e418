"""The published JSON schema and the code accept and refuse the same values in every field of a record."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

import reports
from memcnn.datasets import NUM_CLASSES
from memcnn.models.resnet import MODELS
from memcnn.training import record
from memcnn.training.recipe import Recipe
from memcnn.training.record import RunRecord, Segment
from memcnn.training.record_rules import STATUSES
from properties.support.records import FULL, GENERATED, INCONSISTENT, KINDS, PURE, changed

SCHEMA = json.loads((Path(record.__file__).parent / "record.schema.json").read_text("utf-8"))
BETWEEN_FIELDS = {"iterations", "test_iteration", "reason"}
"""Fields whose faults in ``INCONSISTENT`` are disagreements with other fields, which a schema cannot express."""


@pytest.fixture(scope="module")
def validate():
    fastjsonschema = pytest.importorskip("fastjsonschema", reason="needs fastjsonschema: pip install fastjsonschema")
    check = fastjsonschema.compile(SCHEMA)

    def accepts(values: dict) -> bool:
        try:
            check(values)
        except fastjsonschema.JsonSchemaValueException:
            return False
        return True

    return accepts


def values_of(written: RunRecord, folder: Path) -> dict:
    return json.loads(written.write(folder).read_text())


def test_the_schema_has_the_fields_of_the_code():
    parts = {RunRecord: SCHEMA, Recipe: SCHEMA["properties"]["recipe"], Segment: SCHEMA["definitions"]["segment"]}
    for kind, part in parts.items():
        names = {field.name for field in fields(kind)}
        assert set(part["properties"]) == set(part["required"]) == names
        assert part["additionalProperties"] is False
    choices = {name: tuple(SCHEMA["properties"][name]["enum"]) for name in ("model", "dataset", "status")}
    assert choices == {"model": tuple(MODELS), "dataset": tuple(NUM_CLASSES), "status": STATUSES}
    assert SCHEMA["properties"]["schema"]["const"] == record.SCHEMA


@pytest.mark.parametrize("written", KINDS.values(), ids=KINDS)
def test_every_record_that_the_code_writes_is_valid(tmp_path, validate, written):
    assert validate(values_of(written, tmp_path))
    assert validate(values_of(changed(FULL, data=GENERATED), tmp_path))


@pytest.mark.parametrize("path", sorted((Path(reports.__file__).parent).glob("**/record.json")), ids=str)
def test_every_committed_record_is_valid_once_it_is_read(tmp_path, validate, path):
    assert validate(values_of(record.load(path), tmp_path))


def of_one_field(name: str, change: dict) -> bool:
    """Return True if a fault concerns a single field, and JSON can represent it."""
    text = json.dumps(change)
    return name not in BETWEEN_FIELDS and change != {"test_accuracy": None} and "NaN" not in text


@pytest.mark.parametrize(("name", "change"), [case for case in INCONSISTENT if of_one_field(*case)])
def test_a_field_that_the_code_refuses_is_refused_by_the_schema(tmp_path, validate, name, change):
    assert not validate({**values_of(FULL, tmp_path), **change})


@pytest.mark.parametrize("change", [
    {"first": -1}, {"first": 0.5}, {"execution": None}, {"execution": ""}, {"shared_by": 0}, {"train_seconds": -1},
    {"device": {"type": "cpu"}}, {"software": {}}, {"speed": 1},
])  # fmt: skip
def test_a_segment_that_the_code_refuses_is_refused_by_the_schema(tmp_path, validate, change):
    values = values_of(PURE, tmp_path)
    values["segments"][0] |= change
    assert not validate(values)
