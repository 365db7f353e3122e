"""Named tuples made of what JSON knows: what one process writes (``_asdict``) and another reads.

A field's annotation says of which types it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from ..named import NamedTuple

T = TypeVar("T", bound=NamedTuple)

_KINDS: dict[str, type] = {
    **{kind.__name__: kind for kind in (bool, int, float, str, tuple, dict)},
    "None": type(None),
}


def from_plain(cls: type[T], data: Mapping[str, Any]) -> tuple[T, list[str]]:
    """Make a named tuple, each of whose fields has a default, of what another process wrote.

    Returns:
        It, with defaults for what is missing or makes no sense; and the names of what made none,
        or is unknown here.
    """
    wrong = [name for name in data if name not in cls._fields]
    given: dict[str, Any] = {}
    for name, annotation in cls.__annotations__.items():
        if name not in data:
            continue
        kinds = _kinds(annotation)
        value = data[name]
        if isinstance(value, list) and tuple in kinds:
            value = tuple(value)
        if _fits(value, kinds):
            given[name] = value
        else:
            wrong.append(name)
    return cls._make({**cls._field_defaults, **given}.values()), wrong


def _kinds(annotation: str) -> list[type]:
    """Return the types that an annotation names, such as ``tuple[int, ...] | None``."""
    text = re.sub(r"\[.*\]", "", annotation)
    return [_KINDS[name] for name in text.split(" | ")]


def _fits(value: object, kinds: list[type]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, tuple(kinds))
