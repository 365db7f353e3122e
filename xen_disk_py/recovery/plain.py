"""Frozen dataclasses as what JSON knows, and back: what one process writes and another reads.

A field's default says of which type it is (a factory's is a dictionary); where that is not enough,
as for one that may be None, :func:`kept` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, field, fields
from typing import Any, TypeVar

T = TypeVar("T")


def kept(default: object, *kinds: type) -> Any:
    """Make a field that has one of ``kinds``, or its default."""
    return field(default=default, metadata={"kinds": (*kinds, type(default))})


def to_plain(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass."""
    return asdict(value)


def from_plain(cls: type[T], data: Mapping[str, Any]) -> tuple[T, list[str]]:
    """Make a dataclass of what another process wrote.

    Returns:
        It, with defaults for what is missing or makes no sense; and the names of what made none,
        or is unknown here.
    """
    known: dict[str, Field[Any]] = {each.name: each for each in fields(cls)}  # type: ignore[arg-type]  # it is a dataclass
    wrong = [name for name in data if name not in known]
    given: dict[str, Any] = {}
    for name, each in known.items():
        if name not in data:
            continue
        value = data[name]
        if isinstance(value, list) and tuple in _kinds(each):
            value = tuple(value)
        if _fits(value, each):
            given[name] = value
        else:
            wrong.append(name)
    return cls(**given), wrong


def _kinds(field: Field[Any]) -> tuple[type, ...]:
    default = {} if field.default is MISSING else field.default
    kinds: tuple[type, ...] = field.metadata.get("kinds", (type(default),))
    return kinds


def _fits(value: object, field: Field[Any]) -> bool:
    kinds = _kinds(field)
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)
