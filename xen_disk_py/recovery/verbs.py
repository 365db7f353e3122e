"""What a process that serves a disk can be told: the verbs of :mod:`.control`, and what they do."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

from ..backends import Backend, stack
from ..backends.filter import Filter
from ..backends.loader import filter_options, put_over
from ..datapath.disk import Disk
from ..errors import UsageError
from .control import Control
from .export_in_use import Exports
from .record import Record

if TYPE_CHECKING:
    from ..backends.filters.record import Recorder

_SAMPLING = 0.1
"""Seconds that a guest may wait for what is noted of its disk when a recording begins."""


def register(control: Control, disk: Disk, record: Record) -> None:
    """Register all that any disk can do.

    Args:
        control: where.
        disk: what is served; described in ``record``.
        record: of this process.
    """
    filters = _Filters(disk, record)
    control.register("filter.list", filters.list)
    control.register("filter.set", filters.set)
    control.register("filter.act", filters.act)
    exports = Exports(disk)
    control.register("export.begin", exports.begin)
    control.register("export.end", exports.end)
    recording = _Recording(disk, record, filters)
    control.register("record.start", recording.start)
    control.register("record.stop", recording.stop)
    control.register("record.status", recording.status)
    for each in filters.all:
        each.serves(record.facts.domain, record.facts.vdev)


class _Filters:
    """``xen-disk filter``."""

    def __init__(self, disk: Disk, record: Record) -> None:
        self._record = record
        self._disk = disk

    @property
    def all(self) -> Sequence[Filter]:
        """The first next to the disk."""
        return stack.filters_of(self._disk.backend, len(self._record.facts.spec.filters))

    def list(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"filters": stack.describe(self.all)}

    def set(self, request: dict[str, Any]) -> dict[str, Any]:
        each = stack.find(self.all, _text(request, "filter") or "")
        changes = request.get("settings")
        if not isinstance(changes, list) or not all(isinstance(item, str) for item in changes):
            raise UsageError("settings is no list of key=value")
        return self._change(each, changes)

    def act(self, request: dict[str, Any]) -> dict[str, Any]:
        action = _text(request, "action") or ""
        each = stack.find_by_action(self.all, action, _text(request, "filter"))
        changes = [f"{key}={value}" for key, value in each.actions[action].items()]
        return self._change(each, changes)

    def _change(self, each: Filter, changes: Sequence[str]) -> dict[str, Any]:
        try:
            stack.change(self.all, each, changes, self.note)
        finally:
            self._disk.bind()  # who was idle may not be so now, and the other way round
        return self.list({})

    def note(self, filters: tuple[str, ...]) -> None:
        """Have whoever takes the disk over make the same stack."""
        spec = self._record.facts.spec._replace(filters=filters)
        self._record.update(disk=spec.plain())


class _Recording:
    """``xen-disk record``: a recorder next to the guest, put there and taken away in use.

    One that stands deeper, among the filters of ``connect``, is told to record, and to end that.
    """

    def __init__(self, disk: Disk, record: Record, filters: _Filters) -> None:
        self._disk = disk
        self._record = record
        self._filters = filters

    def start(self, request: dict[str, Any]) -> dict[str, Any]:
        self._disk.check_changeable()
        settings = request.get("settings")
        if not isinstance(settings, list) or not all(isinstance(item, str) for item in settings):
            raise UsageError("settings is no list of key=value")
        stack.check_settings(settings)
        current = self._current()
        if current is not None and current.file is not None:
            raise UsageError(
                f"it is recorded already, in {current.file}: end that with: xen-disk record … stop"
            )
        if current is not None and current is not self._disk.backend:
            self._filters.set({"filter": self._place(current), "settings": settings})
        else:
            self._put(settings)
        return self.status({})

    def _put(self, settings: Sequence[str]) -> None:
        """Put a recorder over all else, in the place of one that is idle."""
        disk, facts = self._disk, self._record.facts
        idle = self._current()
        below = idle.source if idle is not None else disk.backend
        recorder = cast("Recorder", put_over(below, "record:on=no"))
        recorder.serves(facts.domain, facts.vdev)
        given = filter_options(type(recorder), recorder.name, settings)
        stack.configure(recorder, given)
        recorder.given = given
        samples: list[tuple[int, int]] = []

        def change(_: Backend) -> Backend:
            if recorder.has_data and not isinstance(below, Filter):
                samples.extend(_samples(below))
            return recorder

        before = facts.spec.filters
        rest = before if idle is None else before[:-1]
        try:
            # First, so that whoever takes the disk over continues what we have begun.
            self._filters.note((*rest, stack.text_of(recorder)))
            disk.recompose(change)
        except BaseException:
            recorder.finish()
            with suppress(OSError):
                os.unlink(given["file"])
            self._filters.note(before)
            raise
        recorder.know_base(samples)

    def stop(self, request: dict[str, Any]) -> dict[str, Any]:
        current = self._current()
        if current is None:
            return self.status({})
        if current is not self._disk.backend:
            found = self.status({})
            self._filters.set({"filter": self._place(current), "settings": ["on=no"]})
            return {**found, "recording": False}
        before = self._record.facts.spec.filters
        self._filters.note(before[:-1])
        try:
            self._disk.recompose(lambda _: current.source)
        except BaseException:
            self._filters.note(before)
            raise
        current.finish()
        return _told(current)

    def status(self, request: dict[str, Any]) -> dict[str, Any]:
        return _told(self._current())

    def _current(self) -> Recorder | None:
        """The recorder that is next to the guest; None: there is none."""
        found = [each for each in self._filters.all if each.name == "record"]
        return cast("Recorder", found[-1]) if found else None

    def _place(self, each: Filter) -> str:
        return str(list(self._filters.all).index(each) + 1)


def _told(recorder: Recorder | None) -> dict[str, Any]:
    """What ``xen-disk record --json`` prints."""
    if recorder is None or not recorder.is_begun:
        nothing = {"path": None, "data": False, "requests": 0, "lost": 0}
        return {"recording": False, **nothing, "ended": False}
    counters = recorder.counters()
    return {
        "recording": bool(counters["recording"]),
        "path": recorder.given["file"],
        "data": recorder.given.get("data") == "yes",
        "requests": counters["recorded"],
        "lost": counters["lost"],
        "ended": recorder.has_ended,
    }


def _samples(disk: Backend) -> list[tuple[int, int]]:
    """Some of what a disk has now, as far as that is quick: no request is served meanwhile."""
    from ..backends.filters.record import samples_of

    found: list[tuple[int, int]] = []
    deadline = time.monotonic() + _SAMPLING
    with suppress(Exception):  # whatever an author's code raises: the trace says less
        for sample in samples_of(disk):
            found.append(sample)
            if time.monotonic() >= deadline:
                break
    return found


def _text(request: dict[str, Any], key: str) -> str | None:
    value = request.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{key} is no text")
    return value
