"""Checks of values from a file. Each message has the name of the field, its value, and the wanted value."""

from dataclasses import fields
from typing import Any, TypeGuard


def check(right: bool, name: str, got: object, wanted: str) -> None:
    """Raise ValueError unless ``right``."""
    if not right:
        raise ValueError(f"{name}: got {got!r}, wanted {wanted}")


def check_fields(kind: type, values: dict, *, without: str | None = None) -> None:
    """Raise ValueError unless the keys of ``values`` are the fields of the dataclass ``kind``, but for ``without``."""
    wanted = {field.name for field in fields(kind)} - {without}
    if set(values) != wanted:
        raise ValueError(f"missing fields {sorted(wanted - set(values))}, unknown {sorted(set(values) - wanted)}")


def check_keys(name: str, value: Any, kinds: dict[str, type]) -> None:
    """Raise ValueError unless ``value`` is a dict with exactly these keys, each with a value of its type."""
    right = isinstance(value, dict) and set(value) == set(kinds)
    check(right, name, value, f"an object with {', '.join(kinds)}")
    for key, kind in kinds.items():
        check(isinstance(value[key], kind), f"{name}.{key}", value[key], kind.__name__)


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value is a whole number of at least 0."""
    return isinstance(value, int) and is_number(value)


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a finite number of at least 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 2**63
