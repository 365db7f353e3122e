"""What a process that serves a disk can be told: the verbs of :mod:`.control`, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..backends import stack
from ..backends.filter import Filter
from ..datapath.disk import Disk
from ..errors import UsageError
from .control import Control
from .export_in_use import Exports
from .record import Record


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


class _Filters:
    """``xen-disk filter``."""

    def __init__(self, disk: Disk, record: Record) -> None:
        self._record = record
        self._disk = disk
        self._filters = stack.filters_of(disk.backend, len(record.facts.spec.filters))

    def list(self, request: dict[str, Any]) -> dict[str, Any]:
        return {"filters": stack.describe(self._filters)}

    def set(self, request: dict[str, Any]) -> dict[str, Any]:
        each = stack.find(self._filters, _text(request, "filter") or "")
        changes = request.get("settings")
        if not isinstance(changes, list) or not all(isinstance(item, str) for item in changes):
            raise UsageError("settings is no list of key=value")
        return self._change(each, changes)

    def act(self, request: dict[str, Any]) -> dict[str, Any]:
        action = _text(request, "action") or ""
        each = stack.find_by_action(self._filters, action, _text(request, "filter"))
        changes = [f"{key}={value}" for key, value in each.actions[action].items()]
        return self._change(each, changes)

    def _change(self, each: Filter, changes: Sequence[str]) -> dict[str, Any]:
        try:
            stack.change(self._filters, each, changes, self._note)
        finally:
            self._disk.bind()  # who was idle may not be so now, and the other way round
        return self.list({})

    def _note(self, filters: tuple[str, ...]) -> None:
        """Have whoever takes the disk over make the same stack."""
        spec = replace(self._record.facts.spec, filters=filters)
        self._record.update(disk=spec.plain())


def _text(request: dict[str, Any], key: str) -> str | None:
    value = request.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"{key} is no text")
    return value
