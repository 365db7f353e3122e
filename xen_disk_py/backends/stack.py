"""The filters over a disk that is in use: which there are, and other settings for one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import BackendError, UsageError, XenDiskError
from . import Backend
from .filter import Filter
from .finding import user_line
from .loader import filter_arguments, filter_options, filter_parameters


def filters_of(disk: Backend, count: int) -> list[Filter]:
    """Return the ``count`` filters over a disk, the first next to it, as ``--filter`` has them."""
    found: list[Filter] = []
    while len(found) < count and isinstance(disk, Filter):
        found.insert(0, disk)
        disk = disk.source
    return found


def find(filters: Sequence[Filter], which: str) -> Filter:
    """Find a filter by its name, or by its place, from 1 on.

    Raises:
        UsageError: there is none, or there are several of that name.
    """
    names = [each.name for each in filters]
    if not filters:
        raise UsageError("the disk has no filters: it was connected without --filter")
    if which.isascii() and which.isdecimal():
        if not 0 < int(which) <= len(filters):
            raise UsageError(f"there is no filter {which}: the disk has {len(filters)}")
        return filters[int(which) - 1]
    places = [place for place, name in enumerate(names) if which in (name, os.path.basename(name))]
    if len(places) == 1:
        return filters[places[0]]
    if places:
        shown = ", ".join(str(place + 1) for place in places)
        raise UsageError(f"several filters are called {which}: name it by its place: {shown}")
    raise UsageError(f"the disk has no filter {which}; it has {', '.join(names)}")


def find_by_action(filters: Sequence[Filter], action: str, which: str | None) -> Filter:
    """Find the filter for an action: the one that is named, or the only one that has it.

    Raises:
        UsageError: there is none, or there are several.
    """
    if which is not None:
        found = find(filters, which)
        if action not in found.actions:
            raise UsageError(f"the filter {found.name} knows no {action}")
        return found
    able = [place for place, each in enumerate(filters) if action in each.actions]
    if len(able) == 1:
        return filters[able[0]]
    if able:
        shown = ", ".join(f"{place + 1} ({filters[place].name})" for place in able)
        raise UsageError(f"several filters know {action}: name one by its place: {shown}")
    raise UsageError(f"the disk has no filter that knows {action}")


def describe(filters: Sequence[Filter]) -> list[dict[str, Any]]:
    """Tell of each its place, name, settings (all of them, as text) and counters."""
    return [
        {
            "place": place,
            "name": each.name,
            "settings": _settings(each),
            "counters": dict(each.counters()),
        }
        for place, each in enumerate(filters, 1)
    ]


def _settings(each: Filter) -> dict[str, str]:
    found = {}
    for name, parameter in filter_parameters(type(each)).items():
        default = parameter.default
        if name in each.given:
            found[name] = each.given[name]
        elif isinstance(default, bool):
            found[name] = "yes" if default else "no"
        elif default is not None:
            found[name] = str(default)
    return found


def check_settings(settings: Sequence[str]) -> None:
    """See that settings can be written down as ``--filter`` has them.

    Raises:
        UsageError: they cannot.
    """
    for item in settings:
        if "," in item or not item.isprintable():
            raise UsageError(f"{item!r}: no comma or control character can be in a setting")


def change(
    filters: Sequence[Filter],
    each: Filter,
    changes: Sequence[str],
    note: Callable[[tuple[str, ...]], None],
) -> None:
    """Give a filter other settings, all of them or none.

    Args:
        filters: the stack.
        each: one of it.
        changes: ``key=value``; what is not named stays.
        note: writes down what ``--filter`` would have to say now for the same stack.

    Raises:
        UsageError: a setting cannot be, or the filter takes none.
        BackendError: the filter's own code is broken.
        XenDiskError: from ``note``; the settings are as they were then.
    """
    check_settings(changes)
    cls, before = type(each), each.given
    after = {**before, **filter_options(cls, each.name, changes)}
    configure(each, after)
    each.given = after
    try:
        note(tuple(map(text_of, filters)))
    except BaseException:
        each.given = before
        configure(each, before)
        raise


def configure(each: Filter, given: Mapping[str, str]) -> None:
    """Give a filter these settings, and no other than its defaults.

    Raises:
        UsageError: a setting cannot be.
        BackendError: the filter's own code is broken.
    """
    defaults = {name: p.default for name, p in filter_parameters(type(each)).items()}
    try:
        each.configure(**{**defaults, **filter_arguments(type(each), each.name, given)})
    except XenDiskError:
        raise
    except Exception as error:
        raise BackendError(f"{each.name}: {user_line(error, each)}") from error


def text_of(each: Filter) -> str:
    """Return what ``--filter`` says for a filter as it is now."""
    options = ",".join(f"{key}={value}" for key, value in each.given.items())
    return f"{each.name}:{options}" if options else each.name
